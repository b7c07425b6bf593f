"""Frozen NF4 maps: the logical content is what was quantized, every layout multiplies by it, none changes it."""

from __future__ import annotations

import bitsandbytes.functional as bnb_functional
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from torch import nn

from loramux_adapters.base.frozen import DenseLinear, Nf4Linear, logical_nf4
from loramux_adapters.base.weight_formats import WeightFormats, select_weight_formats, supports_packed
from loramux_adapters.kernels.native_linear import find_native_linear

needs_packed = pytest.mark.skipif(not supports_packed(), reason="no AVX512-BF16 kernel on this machine")
SHAPES = [(128, 192), (192, 128), (256, 64), (64, 48), (96, 40)]  # (in, out): packable, and not


def quantized(
    in_features: int, out_features: int, dtype: torch.dtype = torch.float32, *, bias: bool = True, double: bool = False
) -> Linear4bit:
    """A random linear map as transformers would quantize it from a checkpoint of `dtype`."""
    torch.manual_seed(in_features * 1000 + out_features)
    source = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    module = LinearNF4(in_features, out_features, bias=bias, compress_statistics=double)
    module.load_state_dict(source.state_dict())
    module = module.to("cpu").requires_grad_(False)
    module.support_avx512bf16_for_cpu = False
    return module


def by_hand(module: Linear4bit) -> torch.Tensor:
    """The weight from the format's definition: code book entry times the block's scale."""
    codes, absmax, block = logical_nf4(module)
    table = bnb_functional.get_4bit_type("nf4", device="cpu")
    entries = table[torch.stack([codes >> 4, codes & 15], -1).flatten().long()]
    return (entries.view(-1, block) * absmax[:, None]).view(codes.shape[0], -1)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double quantized"])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_dequantize_is_the_format_bit_for_bit(in_features: int, out_features: int, double: bool) -> None:
    module = quantized(in_features, out_features, double=double)
    frozen = Nf4Linear.from_module(module, torch.float32)
    assert torch.equal(frozen.dequantize(torch.float32), by_hand(module))
    assert torch.equal(frozen.dequantize(torch.bfloat16), by_hand(module).to(torch.bfloat16))
    assert frozen.absmax.dtype == torch.float32


@pytest.mark.parametrize("weight_formats", [WeightFormats(), WeightFormats(dense=True)], ids=["codes", "dense"])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_float32_is_the_dense_product_bit_for_bit(
    in_features: int, out_features: int, rows: int, weight_formats: WeightFormats
) -> None:
    module = quantized(in_features, out_features)
    frozen = Nf4Linear.from_module(module, torch.float32)
    frozen.build(weight_formats)
    x = torch.randn(rows, in_features)
    expected = F.linear(x, by_hand(module), module.bias)
    assert torch.equal(frozen.forward(x), expected)
    if in_features % 64 == 0:  # elsewhere bitsandbytes 0.50 dequantizes wrongly on CPU
        assert torch.equal(module(x), expected)


@needs_packed
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["from float32", "from bfloat16"])
def test_packed_layout_holds_the_same_map(source: torch.dtype, rows: int) -> None:
    module = quantized(256, 192, source)
    before = logical_nf4(module)
    frozen = Nf4Linear.from_module(module, torch.bfloat16)
    frozen.build(WeightFormats(packed=True))
    assert frozen._packed is not None
    x = torch.randn(rows, 256).bfloat16()
    expected = F.linear(x.float(), by_hand(module), module.bias.float())
    error = (frozen.forward(x).float() - expected).norm() / expected.norm()
    assert float(error) < 8e-3
    # A float32 checkpoint's block scales are rounded to bfloat16, half a unit in the last place; others are exact.
    assert 0 < frozen.packing_error <= 2**-8 if source == torch.float32 else frozen.packing_error == 0
    assert all(torch.equal(now, then) for now, then in zip(logical_nf4(module)[:2], before[:2], strict=True))


@needs_packed
def test_packed_layout_reads_any_stride() -> None:
    frozen = Nf4Linear.from_module(quantized(256, 192), torch.bfloat16)
    frozen.build(WeightFormats(packed=True))
    x = torch.randn(256, 4).bfloat16().T
    assert torch.equal(frozen.forward(x), frozen.forward(x.contiguous()))


@needs_packed
def test_maps_that_cannot_be_packed_stay_unpacked_and_right() -> None:
    for in_features, out_features in ((128, 48), (96, 64)):
        module = quantized(in_features, out_features)
        frozen = Nf4Linear.from_module(module, torch.bfloat16)
        frozen.build(WeightFormats(packed=True))
        assert frozen._packed is None
        assert frozen.packing_error == 0
        x = torch.randn(3, in_features).bfloat16()
        assert torch.equal(frozen.forward(x), F.linear(x, by_hand(module).bfloat16(), module.bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_same_under_every_layout(dtype: torch.dtype) -> None:
    expected = Nf4Linear.from_module(quantized(256, 192), dtype).dequantize(torch.float32)
    every = [
        WeightFormats(packed=supports_packed()),
        WeightFormats(dense=True),
        WeightFormats(invariant=True),
        WeightFormats(native=True),
    ]
    every.append(WeightFormats(True, True, True, True))
    for weight_formats in every:
        frozen = Nf4Linear.from_module(quantized(256, 192), dtype)
        frozen.build(weight_formats)
        frozen.forward(torch.randn(2, 256).to(dtype))
        assert torch.equal(frozen.dequantize(torch.float32), expected)
        frozen.dequantize(torch.float32).zero_()  # the caller's own
        assert torch.equal(frozen.dequantize(torch.float32), expected)


@pytest.mark.parametrize(
    "weight_formats",
    [
        WeightFormats(),
        WeightFormats(dense=True),
        WeightFormats(packed=supports_packed()),
        WeightFormats(native=True),
    ],
    ids=["codes", "dense", "packed", "native"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_stack_is_its_parts_bit_for_bit(dtype: torch.dtype, weight_formats: WeightFormats) -> None:
    modules = [quantized(128, 128), quantized(128, 64, bias=False), quantized(128, 96)]
    parts = [Nf4Linear.from_module(module, dtype) for module in modules]
    stack = Nf4Linear.stack(parts)
    assert all(parts[0].stackable_with(part) for part in parts)
    assert torch.equal(stack.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(stack.dequantize(torch.float32), torch.cat([by_hand(module) for module in modules]))
    for frozen in (*parts, stack):
        frozen.build(weight_formats)
    for rows in (1, 4, 20):
        x = torch.randn(rows, 128).to(dtype)
        assert torch.equal(stack.forward(x), torch.cat([part.forward(x) for part in parts], 1))


NATIVE = find_native_linear()
needs_native = pytest.mark.skipif(NATIVE is None, reason="no C compiler, or no AVX512-BF16")


def serves_few_rows_apart(frozen: Nf4Linear) -> bool:
    """Whether another product than that for any number of rows was found to fit."""
    return len(frozen._products._products) > 1


@needs_native
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 192), (64, 4), (192, 100), (2048, 64)])
def test_the_native_product_decodes_bit_for_bit(in_features: int, out_features: int, bias: bool) -> None:
    """A row of the identity picks a column of the weight: no sum rounds."""
    frozen = Nf4Linear.from_module(quantized(in_features, out_features, bias=bias), torch.bfloat16)
    frozen.build(WeightFormats(native=True))
    assert serves_few_rows_apart(frozen)
    picked = torch.cat([frozen.forward(rows) for rows in torch.eye(in_features).bfloat16().split(64)]).T
    expected = frozen.dequantize(torch.bfloat16).float()
    if frozen.bias is not None:
        expected += frozen.bias.float()[:, None]
    assert torch.equal(picked, expected.bfloat16())


@needs_native
@pytest.mark.parametrize("dense", [False, True], ids=["codes", "beside dense"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 33, 300])
def test_the_native_product_is_the_same_map(rows: int, dense: bool) -> None:
    module = quantized(256, 192)
    frozen = Nf4Linear.from_module(module, torch.bfloat16)
    frozen.build(WeightFormats(native=True, dense=dense))
    wide = torch.randn(rows, 512).bfloat16()
    for x in (wide[:, :256], wide[:, :256].contiguous(), wide[:, ::2]):
        expected = F.linear(x.double(), by_hand(module).bfloat16().double(), module.bias.bfloat16().double())
        assert torch.allclose(frozen.forward(x).double(), expected, rtol=2**-8, atol=1e-4)


@needs_native
def test_a_native_row_is_the_same_among_any_batch_mates() -> None:
    nf4 = Nf4Linear.from_module(quantized(256, 192), torch.bfloat16)
    nf4.build(WeightFormats(native=True))
    dense = DenseLinear(torch.randn(320, 256).bfloat16(), None, WeightFormats(native=True))
    x = torch.randn(15, 256).bfloat16()
    for frozen in (nf4, dense):
        together = frozen.forward(x)
        for row in range(15):
            assert torch.equal(frozen.forward(x[row : row + 1])[0], together[row])


@needs_native
def test_a_nan_stays_in_its_row() -> None:
    frozen = Nf4Linear.from_module(quantized(128, 64), torch.bfloat16)
    frozen.build(WeightFormats(native=True))
    x = torch.randn(6, 128).bfloat16()
    sound = frozen.forward(x)
    x[2, 100] = float("nan")
    found = frozen.forward(x)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], sound[others])
    assert found[2].isnan().all()


@needs_native
@pytest.mark.parametrize(("in_features", "out_features", "dtype"), [
    (96, 64, torch.bfloat16), (128, 66, torch.bfloat16), (128, 64, torch.float32),
])  # fmt: skip
def test_maps_the_native_product_does_not_take(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    module = quantized(in_features, out_features)
    frozen = Nf4Linear.from_module(module, dtype)
    frozen.build(WeightFormats(native=True))
    assert not serves_few_rows_apart(frozen)
    x = torch.randn(3, in_features).to(dtype)
    assert torch.equal(frozen.forward(x), F.linear(x, by_hand(module).to(dtype), module.bias.to(dtype)))


@needs_native
def test_an_unquantized_weight_natively() -> None:
    weight, bias = torch.randn(100, 64).bfloat16(), torch.randn(100).bfloat16()
    frozen = DenseLinear(weight, bias, WeightFormats(native=True))
    for rows in (1, 5, 16, 40):
        x = torch.randn(rows, 64).bfloat16()
        expected = F.linear(x.double(), weight.double(), bias.double())
        assert torch.allclose(frozen.forward(x).double(), expected, rtol=2**-8, atol=1e-4)


def test_the_fastest_layouts_of_a_device() -> None:
    cpu = torch.device("cpu")
    fast = select_weight_formats(cpu, torch.bfloat16, dense=True, invariant=False)
    assert fast.native == (NATIVE is not None)
    assert fast.packed == (NATIVE is None and supports_packed())
    for device, dtype, invariant in (
        (cpu, torch.float32, False), (cpu, torch.bfloat16, True), (torch.device("cuda"), torch.bfloat16, False),
    ):  # fmt: skip
        plain = WeightFormats(dense=True, invariant=invariant)
        assert select_weight_formats(device, dtype, dense=True, invariant=invariant) == plain


def test_rows_that_share_blocks_do_not_stack() -> None:
    narrow, wide = (Nf4Linear.from_module(quantized(*shape), torch.float32) for shape in ((96, 64), (128, 64)))
    assert not narrow.stackable_with(narrow)  # 96 = one block and a half
    assert not wide.stackable_with(narrow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_invariant_layout_gives_a_row_the_same_bits_among_any_batch_mates(dtype: torch.dtype) -> None:
    nf4 = Nf4Linear.from_module(quantized(256, 192), dtype)
    nf4.build(WeightFormats(packed=True, invariant=True))
    dense = DenseLinear(torch.randn(320, 256).to(dtype), None, WeightFormats(invariant=True))
    x = torch.randn(45, 256).to(dtype)
    for frozen in (nf4, dense):
        together = frozen.forward(x)
        for row in (0, 7, 31, 32, 44):
            assert torch.equal(frozen.forward(x[row : row + 1])[0], together[row])


def test_every_forward_gives_a_tensor_of_its_own() -> None:
    x = torch.randn(2, 128)
    for weight_formats in (WeightFormats(), WeightFormats(dense=True), WeightFormats(invariant=True)):
        frozen = Nf4Linear.from_module(quantized(128, 64), torch.float32)
        frozen.build(weight_formats)
        expected = frozen.forward(x).clone()
        frozen.forward(x).add_(7)
        assert torch.equal(frozen.forward(x), expected)


def test_dense_linear_copies_its_weight_out() -> None:
    weight = torch.randn(8, 16)
    frozen = DenseLinear(weight, None)
    frozen.dequantize(torch.float32).zero_()
    assert torch.equal(frozen.dequantize(torch.float32), weight)
    assert weight.abs().sum() > 0


def test_nbytes_counts_every_layout() -> None:
    frozen = Nf4Linear.from_module(quantized(128, 64), torch.bfloat16)
    bare = 128 * 64 // 2 + 128 * 64 // 64 * 4
    assert frozen.nbytes == bare
    frozen.build(WeightFormats(dense=True))
    assert frozen.nbytes == bare + 128 * 64 * 2


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="not an NF4 weight: fp4"):
        logical_nf4(LinearFP4(64, 64).to("cpu"))


@needs_packed
def test_a_weight_that_a_forward_has_repacked_is_refused() -> None:
    module = quantized(128, 64).eval()
    module.support_avx512bf16_for_cpu = True
    module.compute_dtype, module.compute_type_is_set = torch.bfloat16, True
    with torch.no_grad():
        module(torch.randn(2, 128).bfloat16())
    with pytest.raises(ValueError, match="repacked"):
        logical_nf4(module)

"""Our quantizer gives what bitsandbytes gives on a CPU, code by code, by operations that are exact on every device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base import quantize
from loramux_adapters.base.bitsandbytes_compat import functional
from loramux_adapters.base.load import load_base
from loramux_adapters.base.quantize import quantize_nf4
from support.checkpoints import save_checkpoint, wide_model


def weights(dtype: torch.dtype) -> torch.Tensor:
    """[96, 160]: ordinary values, a block of zeros, one of subnormals, one with a single value, values on borders."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(96, 160, generator=generator) * 10.0 ** torch.randint(-6, 4, (96, 1), generator=generator)
    flat = weight.view(-1)
    flat[:64] = 0
    flat[64:128] = 1e-42
    flat[128:192] = 0
    flat[150] = -3.0
    code = functional.get_4bit_type("nf4", device=torch.device("cpu"))
    flat[192:207] = (code[:-1] + code[1:]) / 2
    flat[207] = 1.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("size", [96 * 160, 1000, 63, 1])
def test_codes_and_scales_are_those_of_bitsandbytes_on_a_cpu(dtype: torch.dtype, block_size: int, size: int) -> None:
    weight = weights(dtype).reshape(-1)[:size]
    codes, state = quantize_nf4(weight, block_size)
    expected, wanted = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax, wanted.absmax)
    assert state.as_dict(packed=True).keys() == wanted.as_dict(packed=True).keys()


def test_a_weight_worked_on_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(torch.float32)
    whole, state = quantize_nf4(weight, 64)
    monkeypatch.setattr(quantize, "_CHUNK", 1000)
    pieces, same = quantize_nf4(weight, 64)
    assert torch.equal(whole, pieces)
    assert torch.equal(state.absmax, same.absmax)


def test_nested_scales_are_those_of_bitsandbytes() -> None:
    weight = weights(torch.float32)
    codes, state = quantize_nf4(weight, 64, nested=True)
    expected, wanted = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(codes, expected)
    assert state.nested
    assert torch.equal(functional.dequantize_4bit(codes, state), functional.dequantize_4bit(expected, wanted))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_base_is_quantized_by_it_and_keeps_its_fingerprint(
    architecture: str, double_quant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_checkpoint(wide_model(architecture), tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_ExactQuantizer", quantize.Bnb4BitHfQuantizer)
        before = load_base(checkpoint, compute_dtype=torch.float32, double_quant=double_quant)

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("bitsandbytes' own quantizer was called")

    monkeypatch.setattr(functional, "quantize_4bit", unwanted)
    base = load_base(checkpoint, compute_dtype=torch.float32, double_quant=double_quant)
    assert base.spec.fingerprint == before.spec.fingerprint

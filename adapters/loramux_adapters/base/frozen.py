"""The frozen maps of the base: y = W x + b over NF4 codes or a plain weight, by the product that is fastest here.

The logical content (codes [out, in], float32 absmax) is kept as loaded and never written; a packed or a dense layout
stands beside it. Which product serves how many rows (see `weight_formats`) is settled when the formats are built.
bitsandbytes' own forward repacks weights in place on some CPUs, so it is never called.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from loramux_adapters.base.bitsandbytes_compat import Linear4bit, matmul_4bit
from loramux_adapters.base.bitsandbytes_compat import functional as bnb_functional
from loramux_adapters.base.weight_formats import (
    NATIVE_ROWS_ALONE,
    NATIVE_ROWS_ALONE_WITH_TILES,
    NATIVE_ROWS_BESIDE_DENSE,
    NATIVE_ROWS_BESIDE_TILES,
    NATIVE_ROWS_OF_DENSE_WEIGHT,
    PACKED_ROWS_ALONE,
    PACKED_ROWS_BESIDE_DENSE,
    Product,
    Products,
    WeightFormats,
)
from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.native_linear import (
    BLOCK_MULTIPLE,
    IN_MULTIPLE,
    OUT_MULTIPLE,
    NativeLinear,
    find_native_linear,
)


class FrozenLinear(Protocol):
    """One or several stacked frozen linear maps over the same input."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None  # [out] in the compute dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> a new tensor [T, out]."""

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of y [T, out] -> that of x [T, in], by the weights that `forward` multiplies by."""

    def dequantize(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The weight [out, in] in `dtype`, or its rows [from, to); a new tensor the caller may write to."""


class Nf4Linear:
    """An NF4 weight [out, in] with float32 absmax per block of `block_size` along the flattened weight.

    Format: Dettmers et al., QLoRA (2023), and bitsandbytes' QuantState. Double quantization of the
    absmax is undone once, here.
    """

    def __init__(
        self,
        codes: torch.Tensor,  # [out, in / 2] uint8, two codes a byte, high nibble first
        absmax: torch.Tensor,  # [out * in / block_size] float32
        block_size: int,
        bias: torch.Tensor | None,
        compute_dtype: torch.dtype,
    ) -> None:
        self.codes, self.absmax, self.block_size, self.bias = codes, absmax, block_size, bias
        self.compute_dtype = compute_dtype
        self.out_features, self.in_features = int(codes.shape[0]), int(codes.shape[1]) * 2
        self._state = bnb_functional.QuantState(
            absmax=absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=bnb_functional.get_4bit_type("nf4", device=codes.device),
            blocksize=block_size,
            quant_type="nf4",
            dtype=compute_dtype,
        )
        self._is_invariant = False
        self._packed: tuple[torch.Tensor, Any] | None = None
        self._dense: torch.Tensor | None = None
        self._products = Products((math.inf, self._largest_product()))

    @classmethod
    def from_module(cls, module: Linear4bit, compute_dtype: torch.dtype) -> Nf4Linear:
        """Takes over a quantized bitsandbytes module's storage; the module must not have run forward."""
        codes, absmax, block_size = logical_nf4(module)
        bias = None if module.bias is None else module.bias.detach().to(compute_dtype)
        return cls(codes, absmax, block_size, bias, compute_dtype)

    @classmethod
    def stack(cls, parts: Sequence[Nf4Linear]) -> Nf4Linear:
        """The parts' rows one under the other: bitwise the same products, since blocks never cross a row border."""
        first = parts[0]
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [
                    torch.zeros(part.out_features, dtype=first.compute_dtype, device=first.codes.device)
                    if part.bias is None
                    else part.bias
                    for part in parts
                ]
            )
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.absmax for part in parts]),
            first.block_size,
            bias,
            first.compute_dtype,
        )

    def stackable_with(self, other: Nf4Linear) -> bool:
        """Whether `stack` is exact: same input, same blocks, whole blocks per row."""
        return (
            self.in_features == other.in_features
            and self.block_size == other.block_size
            and self.in_features % self.block_size == 0
        )

    def build(self, weight_formats: WeightFormats) -> None:
        """Builds the formats once, each checked against the codes, and settles which product serves how many rows."""
        if weight_formats.dense:
            self._dense = self.dequantize(self.compute_dtype)
        if weight_formats.invariant:
            self._is_invariant, self._products = True, Products((math.inf, self._multiply_invariant))
            return
        few: list[tuple[float, Product]] = []
        native = self._find_native() if weight_formats.native else None
        if native is not None:
            beside = NATIVE_ROWS_BESIDE_TILES if native.has_tiles else NATIVE_ROWS_BESIDE_DENSE
            alone = NATIVE_ROWS_ALONE_WITH_TILES if native.has_tiles else NATIVE_ROWS_ALONE
            few.append((alone if self._dense is None else beside, self._native_product(native)))
        elif weight_formats.packed and self._is_packable():
            packed, state = self._packed = self._pack()
            rows = PACKED_ROWS_ALONE if self._dense is None else PACKED_ROWS_BESIDE_DENSE
            few.append((rows, self._fused_product(packed, state)))
        self._products = Products(*few, (math.inf, self._largest_product()))

    def _largest_product(self) -> Product:
        if self._dense is None and self.codes.is_cuda:
            return self._fused_product(self.codes.reshape(-1, 1), self._state)
        return self._multiply_dense

    def _find_native(self) -> NativeLinear | None:
        fits = self.compute_dtype == torch.bfloat16 and self.in_features % self.block_size == 0
        fits = fits and self.block_size % BLOCK_MULTIPLE == 0 and self.out_features % OUT_MULTIPLE == 0
        return find_native_linear() if fits else None

    def _is_packable(self) -> bool:
        fits = self.out_features % 32 == 0 and self.in_features % self.block_size == 0
        return fits and self.compute_dtype == torch.bfloat16

    def _native_product(self, native: NativeLinear) -> Product:
        def multiply(x: torch.Tensor) -> torch.Tensor:
            return native.nf4(x, self.codes, self.absmax, self.block_size, self._state.code, self.bias)

        return multiply

    def _fused_product(self, codes: torch.Tensor, state: Any) -> Product:
        """bitsandbytes' own, which on a CPU reads a unit inner stride without a check."""

        def multiply(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = matmul_4bit(x.contiguous(), codes, quant_state=state)
            return y if self.bias is None else y.add_(self.bias)

        return multiply

    def _multiply_dense(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight(x.dtype), self.bias)

    def _multiply_invariant(self, x: torch.Tensor) -> torch.Tensor:
        return invariant.linear(x, self._weight(x.dtype), self.bias)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense copy, or a scratch weight for this call."""
        return self.dequantize(dtype) if self._dense is None else self._dense

    def _pack(self) -> tuple[torch.Tensor, Any]:
        flat = self.codes.reshape(-1, 1)
        packed, state = bnb_functional._convert_weight_packed_for_cpu(flat.clone(), copy.deepcopy(self._state))
        back, _ = bnb_functional._convert_weight_packed_for_cpu_inverse(packed, copy.deepcopy(state))
        if not torch.equal(back.reshape(-1), self.codes.reshape(-1)):
            raise RuntimeError("the packed NF4 layout does not hold the same codes: refusing to serve from it")
        return packed, state

    @property
    def packing_error(self) -> float:
        """Largest relative error of a block's scale in the packed layout, which keeps absmax in bf16; 0 without it."""
        if self._packed is None:
            return 0.0
        rounded = self.absmax.to(torch.bfloat16).float()
        return float(((rounded - self.absmax).abs() / self.absmax.abs().clamp_min(1e-30)).max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] contiguous, T >= 1 -> [T, out]."""
        return self._products(x)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """[T, out] -> [T, in]; as invariant as `forward`."""
        weight = self._weight(gradient.dtype)
        return invariant.linear(gradient, weight.T) if self._is_invariant else gradient @ weight

    def dequantize(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The weight [out, in], or its rows [from, to); rounds once, to `dtype`."""
        begin, end = (0, self.out_features) if rows is None else rows
        if rows is not None and self.in_features % self.block_size:
            return self.dequantize(dtype)[begin:end].clone()  # blocks cross the borders of rows
        state = copy.copy(self._state)
        state.dtype = dtype
        # Flat: bitsandbytes 0.50 on CPU takes the wrong scales where a block crosses a row border of a 2-D shape.
        state.shape = torch.Size(((end - begin) * self.in_features,))
        blocks = self.in_features // self.block_size
        if rows is not None:
            state.absmax = self.absmax[begin * blocks : end * blocks]
        weight: torch.Tensor = bnb_functional.dequantize_4bit(self.codes[begin:end].reshape(-1, 1), state)
        return weight.reshape(end - begin, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all formats that were built."""
        tensors = [self.codes, self.absmax]
        tensors += [self._dense] if self._dense is not None else []
        tensors += [self._packed[0], self._packed[1].absmax] if self._packed is not None else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class DenseLinear:
    """An unquantized frozen weight [out, in]: lm_head, or a base that keeps a projection in full."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, weight_formats: WeightFormats = WeightFormats()
    ) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = int(weight.shape[0]), int(weight.shape[1])
        self._is_invariant = weight_formats.invariant
        self._products = self._choose(weight_formats)

    def _choose(self, weight_formats: WeightFormats) -> Products:
        if weight_formats.invariant:
            return Products((math.inf, lambda x: invariant.linear(x, self.weight, self.bias)))
        any_rows: tuple[float, Product] = (math.inf, lambda x: F.linear(x, self.weight, self.bias))
        native = self._find_native() if weight_formats.native else None
        if native is None:
            return Products(any_rows)
        return Products((NATIVE_ROWS_OF_DENSE_WEIGHT, lambda x: native.dense(x, self.weight, self.bias)), any_rows)

    def _find_native(self) -> NativeLinear | None:
        native = find_native_linear()
        fits = self.weight.dtype == torch.bfloat16 and self.weight.is_contiguous()
        fits = fits and self.in_features % IN_MULTIPLE == 0 and self.out_features % OUT_MULTIPLE == 0
        return native if native is not None and fits and not native.has_tiles else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return self._products(x)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """[T, out] -> [T, in]; as invariant as `forward`."""
        return invariant.linear(gradient, self.weight.T) if self._is_invariant else gradient @ self.weight

    def dequantize(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A copy of the weight in `dtype`, or of its rows [from, to)."""
        begin, end = (0, self.out_features) if rows is None else rows
        return self.weight[begin:end].to(dtype, copy=True)


def logical_nf4(module: Linear4bit) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(codes [out, in / 2] uint8, absmax float32, block size) of a quantized module, double quantization undone.

    Raises ValueError for a module that is not NF4 or that a forward has already repacked.
    """
    state = module.weight.quant_state
    if state is None or state.quant_type != "nf4":
        raise ValueError(f"not an NF4 weight: {getattr(state, 'quant_type', None)}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("the weight was repacked by a forward before its content was read")
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    out_features, in_features = state.shape
    codes = module.weight.data.view(torch.uint8).reshape(out_features, in_features // 2)
    return codes, absmax.float(), int(state.blocksize)


def freeze(module: nn.Module, compute_dtype: torch.dtype, weight_formats: WeightFormats) -> FrozenLinear:
    """The map of a Linear4bit, Linear or Conv1D over the module's own storage; an NF4 one is still to be built."""
    if isinstance(module, Linear4bit):
        return Nf4Linear.from_module(module, compute_dtype)
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    return DenseLinear(weight.T.contiguous() if isinstance(module, Conv1D) else weight, bias, weight_formats)

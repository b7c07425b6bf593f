"""Products of few rows with a frozen weight on a CPU by native_linear.c: NF4 is read in its four bits.

Needs AVX512-BF16. A row's result does not depend on the other rows, and decoded weights are bit for bit those that
dequantizing gives.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from loramux_adapters.kernels.native_build import find_library

SOURCE = Path(__file__).with_suffix(".c")
IN_MULTIPLE, OUT_MULTIPLE, BLOCK_MULTIPLE = 32, 4, 32
"""What `in`, `out` and the block size must be multiples of."""

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    """`linear_t` of the source, field by field."""

    _fields_ = [
        ("x", _POINTER),
        ("x_stride", _NUMBER),
        ("rows", _NUMBER),
        ("in_features", _NUMBER),
        ("weight", _POINTER),
        ("absmax", _POINTER),
        ("block", _NUMBER),
        ("code", _POINTER),
        ("bias", _POINTER),
        ("y", _POINTER),
        ("out", _NUMBER),
    ]


class NativeLinear:
    """Both products are bfloat16 in and out, with float32 sums; MemoryError when there is no scratch memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.has_tiles = bool(library.loramux_linear_has_tiles())
        """Whether the library's own products use AMX, and overtake these at fewer rows."""
        self._call = library.loramux_linear
        self._call.argtypes, self._call.restype = (ctypes.POINTER(_Linear), ctypes.c_int), ctypes.c_int

    def nf4(
        self,
        x: torch.Tensor,  # [T, in]
        codes: torch.Tensor,  # [out, in / 2] uint8, high nibble first
        absmax: torch.Tensor,  # [out * in / block] float32
        block: int,
        code: torch.Tensor,  # [16] float32
        bias: torch.Tensor | None,  # [out]
    ) -> torch.Tensor:
        """x W^T + bias -> [T, out]. `in` must be whole blocks; see the multiples above."""
        return self._run(x, codes, bias, absmax.data_ptr(), block, code.data_ptr())

    def dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in], weight [out, in] -> [T, out]."""
        return self._run(x, weight, bias, None, 0, None)

    def _run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        absmax: int | None,
        block: int,
        code: int | None,
    ) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{x.dtype} in, for a product in bfloat16")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])
        linear = _Linear(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            x.shape[1],
            weight.data_ptr(),
            absmax,
            block,
            code,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            weight.shape[0],
        )
        if self._call(linear, torch.get_num_threads()):
            raise MemoryError("no memory for the scratch rows of a product")
        return y


@cache
def find_native_linear() -> NativeLinear | None:
    """The compiled products, None where they cannot be had or the processor lacks AVX512-BF16."""
    path = find_library(SOURCE)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    return NativeLinear(library) if library.loramux_linear_supported() else None

"""Attention of decode rows on a CPU by native_decode.c: reads the rows' own blocks where they lie."""

from __future__ import annotations

import ctypes
from functools import cache as once
from pathlib import Path

import torch

from loramux_adapters.kernels.native_build import find_library
from loramux_server.model.attention_metadata import AttentionParams, DecodeBatch
from loramux_server.model.cache import PagedCache

SOURCE = Path(__file__).with_suffix(".c")


class _Decode(ctypes.Structure):
    """`decode_t` of the source, field by field."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kv_heads", "block_size", "key_width", "value_width")),
        ("query", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "group")),
        ("out", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class NativeDecode:
    """Implements `DecodeAttention` for bf16 and float32. A row's bits depend on its own request alone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._calls = {torch.bfloat16: library.loramux_decode_bf16, torch.float32: library.loramux_decode_f32}
        for call in self._calls.values():
            call.argtypes, call.restype = (ctypes.POINTER(_Decode), ctypes.c_int), ctypes.c_int

    def __call__(
        self, cache: PagedCache, layer: int, query: torch.Tensor, rows: DecodeBatch, params: AttentionParams
    ) -> torch.Tensor:
        """See `DecodeAttention`. Raises MemoryError when there is none for the scores."""
        shape = cache.layers[layer]
        if query.stride(2) != 1:
            query = query.contiguous()
        count, heads, _ = query.shape
        out = query.new_empty(count, heads, shape.value_width)
        decode = _Decode(
            keys=cache.keys[layer].data_ptr(),
            values=cache.values[layer].data_ptr(),
            kv_heads=shape.heads,
            block_size=cache.block_size,
            key_width=shape.key_width,
            value_width=shape.value_width,
            query=query.data_ptr(),
            row_stride=query.stride(0),
            head_stride=query.stride(1),
            group=heads // shape.heads,
            out=out.data_ptr(),
            table=rows.blocks.data_ptr(),
            table_width=rows.blocks.shape[1],
            positions=rows.positions.data_ptr(),
            rows=count,
            window=params.window or 0,
            scale=params.scale,
            softcap=params.softcap or 0.0,
        )
        if self._calls[query.dtype](decode, torch.get_num_threads()):
            raise MemoryError("no memory for the scores of a step")
        return out


@once
def find_native_decode() -> NativeDecode | None:
    """The compiled kernel, None where it cannot be had."""
    library = find_library(SOURCE)
    return None if library is None else NativeDecode(ctypes.CDLL(str(library)))

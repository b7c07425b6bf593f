"""Gathered low-rank products on a CPU by native_low_rank.c: reads exactly the rank rows in use, sums in float32.

Long segments of high rank go to the library's matrix products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.kernels.gathered import GatheredPlan, planner
from loramux_adapters.kernels.native_build import find_library
from loramux_adapters.kernels.prepared import PreparedStep, Segment
from loramux_adapters.kernels.protocol import LowRankPools, RankRowsOfSlots, SlotSegment

SOURCE = Path(__file__).with_suffix(".c")

NATIVE_ROWS = 32
"""Rank rows up to which a segment of many tokens is walked natively; beyond it the library's product is faster
(16 x 128 tokens over 12 layers of the 125M shape, one core: 99, 273 and 708 ms at rank 8, 32 and 64, against 174, 218
and 589; two busy cores: 230 and 457 at 16 and 32, against 822 and 1001: many small products wait for each other)."""

FEW_TOKENS = 16
"""Tokens up to which a segment is walked natively whatever its rank: there is nothing for a product to reuse."""


class _Segment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("start", "stop", "row", "rows")]


class _Map(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("segment", ctypes.POINTER(_Segment)),
    ]


@dataclass(frozen=True, eq=False)
class NativePlan:
    """Segments ready for the native call, and those left to the library."""

    native: Any  # ctypes array of _Segment, None where there is none
    count: int
    rest: GatheredPlan | None


class NativeKernels:
    """Implements `Kernels` for bf16 and float32 on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments: Sequence[Any] = (pointer, number, pointer, *[number] * 3, ctypes.c_int)
        self._calls = {torch.bfloat16: library.loramux_low_rank_bf16, torch.float32: library.loramux_low_rank_f32}
        for call in self._calls.values():
            call.argtypes, call.restype = arguments, ctypes.c_int

    def prepare(self, rows: int, segments: Sequence[SlotSegment], device: torch.device) -> PreparedStep[NativePlan]:
        """Natively but for long segments of high rank, which go to matrix products."""
        plan_products = planner(rows, segments, device)

        def make(used: tuple[Segment, ...], rank_rows: RankRowsOfSlots) -> NativePlan:
            native: list[Segment] = []
            left: list[Segment] = []
            for segment in used:
                walked = segment.rows <= NATIVE_ROWS or segment.stop - segment.start <= FEW_TOKENS
                (native if walked else left).append(segment)
            if not native:
                return NativePlan(None, 0, plan_products(used, rank_rows))
            array = (_Segment * len(native))(*[_Segment(*segment) for segment in native])
            return NativePlan(array, len(native), GatheredPlan(tuple(left)) if left else None)

        return PreparedStep(rows, segments, make)

    def add(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools, prepared: PreparedStep[NativePlan]) -> None:
        """See `Kernels.add`. Raises MemoryError when there is no scratch memory."""
        maps = []
        for member, plan in enumerate(prepared.plans(y, x, pools)):
            if plan is None:
                continue
            a, b, columns = pools.a[member], pools.b[member], pools.columns[member]
            if plan.count:
                maps.append(_map(y, a, b, columns[0], plan))
            if plan.rest is not None:
                plan.rest.add(y[:, slice(*columns)], x, a, b)
        if maps:
            if y.stride(1) != 1:
                raise ValueError("the outputs of a row must be contiguous")
            rows = x if x.stride(1) == 1 else x.contiguous()
            failed = self._calls[x.dtype](
                (_Map * len(maps))(*maps), len(maps), rows.data_ptr(), rows.stride(0), x.shape[1], y.stride(0),
                torch.get_num_threads(),
            )  # fmt: skip
            if failed:
                raise MemoryError("no memory for the shrunk rows of a step")


def _map(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, column: int, plan: NativePlan) -> _Map:
    """One map's arguments: a [C, in], b [C, out], its first column in y."""
    first = y.data_ptr() + column * y.itemsize
    return _Map(a.data_ptr(), b.data_ptr(), first, b.shape[1], plan.count, plan.native)


@cache
def find_native() -> NativeKernels | None:
    """The compiled kernels, None where they cannot be had."""
    library = find_library(SOURCE)
    return None if library is None else NativeKernels(ctypes.CDLL(str(library)))

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

from lorica_adapters.kernels.gathered import GatheredKernels
from lorica_adapters.kernels.native_build import find_library
from lorica_adapters.kernels.protocol import RankPlan, Segment

SOURCE = Path(__file__).with_suffix(".c")

NATIVE_ROWS = 64
"""Rank rows up to which a segment of many tokens is walked natively; beyond it the library's product is faster."""

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
class NativePlan(RankPlan):
    """`segments` are those left to the library; the native ones are ready for the call."""

    native: Any = None  # ctypes array of _Segment
    count: int = 0


class NativeKernels:
    """Implements `Kernels` for bf16 and float32 on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments: Sequence[Any] = (pointer, number, pointer, *[number] * 3, ctypes.c_int)
        self._calls = {torch.bfloat16: library.lorica_low_rank_bf16, torch.float32: library.lorica_low_rank_f32}
        for call in self._calls.values():
            call.argtypes, call.restype = arguments, ctypes.c_int
        self._products = GatheredKernels()

    def plan(self, segments: Sequence[Segment], token_slots: torch.Tensor, row_slots: torch.Tensor) -> RankPlan:
        """Natively but for long segments of high rank, which go to matrix products."""
        native: list[Segment] = []
        left: list[Segment] = []
        for segment in segments:
            walked = segment.rows <= NATIVE_ROWS or segment.stop - segment.start <= FEW_TOKENS
            (native if walked else left).append(segment)
        if not native:
            return self._products.plan(segments, token_slots, row_slots)
        return NativePlan(
            segments=tuple(left),
            first=segments[0].start,
            low=0,
            high=0,
            drop=None,
            native=(_Segment * len(native))(*[_Segment(*segment) for segment in native]),
            count=len(native),
        )

    def add_low_rank(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        columns: Sequence[tuple[int, int]],
        plans: Sequence[RankPlan | None],
    ) -> None:
        """See `Kernels.add_low_rank`."""
        native = [member for member, plan in enumerate(plans) if isinstance(plan, NativePlan)]
        if native:
            self._run(y, x if x.stride(1) == 1 else x.contiguous(), a, b, columns, plans, native)
        if len(native) < len(plans) or any(plan is not None and plan.segments for plan in plans):
            self._products.add_low_rank(y, x, a, b, columns, plans)

    def _run(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        columns: Sequence[tuple[int, int]],
        plans: Sequence[RankPlan | None],
        members: Sequence[int],
    ) -> None:
        maps = (_Map * len(members))()
        for place, member in enumerate(members):
            plan = plans[member]
            if not isinstance(plan, NativePlan):
                raise TypeError("only members with native segments are run natively")
            maps[place] = _Map(
                a[member].data_ptr(),
                b[member].data_ptr(),
                y.data_ptr() + columns[member][0] * y.itemsize,
                b[member].shape[1],
                plan.count,
                plan.native,
            )
        failed = self._calls[x.dtype](
            maps, len(members), x.data_ptr(), x.stride(0), x.shape[1], y.stride(0), torch.get_num_threads()
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the shrunk rows of a step")


@cache
def find_native() -> NativeKernels | None:
    """The compiled kernels, None where they cannot be had."""
    library = find_library(SOURCE)
    return None if library is None else NativeKernels(ctypes.CDLL(str(library)))

"""Few rows per adapter on a CPU, by native_low_rank.c.

Reads exactly the rank rows in use and sums in float32; segments of many rows go to the library's matrix products. Where
there is no C compiler the plain torch path serves.
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

SHORT_SEGMENT = 256
"""Tokens x rank rows up to which a segment is walked natively: beyond it a matrix product reuses what it has read."""


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
    """`segments` are the long ones; the short ones are ready for the call."""

    short: Any = None  # ctypes array of _Segment
    count: int = 0
    begin: int = 0  # first token row of a short segment
    end: int = 0
    most_rows: int = 0


class NativeKernels:
    """Implements `Kernels` for bf16 and float32 on a CPU."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        # PyDLL keeps the interpreter lock: a call takes tens of microseconds, less than handing the lock over may.
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arguments: Sequence[Any] = (pointer, number, pointer, *[number] * 7, ctypes.c_int)
        self._calls = {torch.bfloat16: library.lorica_low_rank_bf16, torch.float32: library.lorica_low_rank_f32}
        for call in self._calls.values():
            call.argtypes, call.restype = arguments, ctypes.c_int
        self._products = GatheredKernels()

    def plan(self, segments: Sequence[Segment], token_slots: torch.Tensor, row_slots: torch.Tensor) -> RankPlan:
        """Short segments natively, long ones by matrix products."""
        short = [s for s in segments if s.stop - s.start == 1 or (s.stop - s.start) * s.rows <= SHORT_SEGMENT]
        if not short:
            return self._products.plan(segments, token_slots, row_slots)
        return NativePlan(
            segments=tuple(s for s in segments if s not in short),
            first=segments[0].start,
            low=0,
            high=0,
            drop=None,
            short=(_Segment * len(short))(*[_Segment(*segment) for segment in short]),
            count=len(short),
            begin=short[0].start,
            end=short[-1].stop,
            most_rows=max(segment.rows for segment in short),
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
        begin, end, most_rows, most_out = x.shape[0], 0, 0, 0
        for place, member in enumerate(members):
            plan = plans[member]
            if not isinstance(plan, NativePlan):
                raise TypeError("only members with short segments are run natively")
            out = b[member].shape[1]
            maps[place] = _Map(
                a[member].data_ptr(),
                b[member].data_ptr(),
                y.data_ptr() + columns[member][0] * y.itemsize,
                out,
                plan.count,
                plan.short,
            )
            begin, end = min(begin, plan.begin), max(end, plan.end)
            most_rows, most_out = max(most_rows, plan.most_rows), max(most_out, out)
        failed = self._calls[x.dtype](
            maps, len(members), x.data_ptr(), x.stride(0), x.shape[1], y.stride(0), begin, end, most_rows, most_out,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the shrunk rows of a step")


@cache
def find_native() -> NativeKernels | None:
    """The compiled kernels, None where they cannot be had."""
    library = find_library(SOURCE)
    return None if library is None else NativeKernels(ctypes.PyDLL(str(library)))

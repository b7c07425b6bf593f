"""The rows of one step as the implementations keep them: for each content of rank rows, made once, on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from loramux_adapters.kernels.protocol import LowRankPools, RankRowsOfSlots, SlotSegment


class Segment(NamedTuple):
    """Token rows [start, stop) use rank rows [row, row + rows) of the pool."""

    start: int
    stop: int
    row: int
    rows: int


P = TypeVar("P")


class PreparedStep(Generic[P]):
    """`make` turns segments (not empty, sorted, disjoint) and their rank rows into a plan P."""

    def __init__(
        self,
        rows: int,
        segments: Sequence[SlotSegment],
        make: Callable[[tuple[Segment, ...], RankRowsOfSlots], P],
    ) -> None:
        self.rows = rows
        self._segments, self._make = segments, make
        self._plans: dict[RankRowsOfSlots, tuple[P | None, int]] = {}  # with the end of the last rank row in use

    def plans(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> list[P | None]:
        """A plan for each map of the pools, None where no row has an adapter on it.

        Raises ValueError where x or y are not of the pools, or there is a plan and they have other rows than the step:
        a native kernel would leave them.
        """
        pools.check(y, x)
        plans = [None if rank_rows is None else self._plan(rank_rows, pools) for rank_rows in pools.rank_rows]
        if (len(x) != self.rows or len(y) != self.rows) and any(plan is not None for plan in plans):
            raise ValueError(f"{len(x)} rows in, {len(y)} out, in a step of {self.rows}")
        return plans

    def _plan(self, rank_rows: RankRowsOfSlots, pools: LowRankPools) -> P | None:
        if rank_rows not in self._plans:
            used = tuple(
                Segment(segment.start, segment.stop, *rank_rows.ranges[segment.slot])
                for segment in self._segments
                if segment.slot in rank_rows.ranges
            )
            if any(segment.stop > self.rows for segment in used):
                raise ValueError(f"a segment leaves the step of {self.rows} rows: {used}")
            end = max((segment.row + segment.rows for segment in used), default=0)
            self._plans[rank_rows] = self._make(used, rank_rows) if used else None, end
        plan, end = self._plans[rank_rows]
        if end > pools.a.shape[1]:
            raise ValueError(f"rank rows up to {end} of {pools.a.shape[1]} rank rows of the pool")
        return plan

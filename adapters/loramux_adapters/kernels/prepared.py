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
        self._plans: dict[RankRowsOfSlots, P | None] = {}

    def plans(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> list[P | None]:
        """A plan for each map of the pools, None where no row has an adapter on it.

        Raises ValueError where there is one and x or y have other rows than the step: a native kernel would leave them.
        """
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
            capacity = pools.a.shape[1]
            if any(segment.row + segment.rows > capacity or segment.stop > self.rows for segment in used):
                raise ValueError(f"a segment leaves the step or the {capacity} rank rows of the pool: {used}")
            self._plans[rank_rows] = self._make(used, rank_rows) if used else None
        return self._plans[rank_rows]

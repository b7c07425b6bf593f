"""The border of the low-rank arithmetic: y += B A x, each row of x with the rank rows of its own adapter.

Tensors in, tensors out. A pool holds the rank rows of many adapters; which rows belong to which tokens of this step is
a `RankPlan`, made once per step and layout and shared by every module with that layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Segment(NamedTuple):
    """Token rows [start, stop) use rank rows [row, row + rows) of the pool."""

    start: int
    stop: int
    row: int
    rows: int


@dataclass(frozen=True, eq=False)
class RankPlan:
    """Who uses which rank rows in this step. Tokens before `first` have no adapter and are not touched.

    Where `drop` is None the segments are walked one by one; otherwise the products run over the rank rows
    [low, high) at once and `drop` [T - first, high - low] is True where a rank row is not the token's own.
    An implementation may add to it what only itself reads.
    """

    segments: tuple[Segment, ...]
    first: int
    low: int
    high: int
    drop: torch.Tensor | None


class Kernels(Protocol):
    """One implementation of the arithmetic; chosen once, at start."""

    def plan(self, segments: Sequence[Segment], token_slots: torch.Tensor, row_slots: torch.Tensor) -> RankPlan:
        """Decides how to run a step.

        `segments`: not empty, sorted, disjoint. `token_slots` [T] and `row_slots` [C] name the slot of each token row
        (negative: none) and of each rank row of the pool (negative: free); a slot's own rows are those of equal value.
        """

    def add_low_rank(
        self,
        y: torch.Tensor,  # [T, sum of outs], written in place
        x: torch.Tensor,  # [T, in]
        a: torch.Tensor,  # [M, C, in], rank rows of M maps over the same input
        b: Sequence[torch.Tensor],  # M of [C, out]
        columns: Sequence[tuple[int, int]],  # M of [from, to) in y
        plans: Sequence[RankPlan | None],  # M; None: no token of this step has an adapter on that map
    ) -> None:
        """y[:, columns[m]] += (x @ a[m].T) @ b[m], restricted to each row's own rank rows."""

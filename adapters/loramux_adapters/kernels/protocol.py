"""The border of the low-rank arithmetic: y += B A x, each row of x with the rank rows of its own adapter.

Tensors in, tensors out. A pool holds the rank rows of many adapters. What an implementation makes of the rows of a step
is its own: everybody else carries it from `prepare` to `add` unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


class SlotSegment(NamedTuple):
    """Rows [start, stop) of a step belong to `slot`."""

    start: int
    stop: int
    slot: int


class RankRowsOfSlots(Protocol):
    """Which rank rows of a pool belong to which slot. Immutable; equal contents may be one object."""

    @property
    def ranges(self) -> Mapping[int, tuple[int, int]]:
        """Slot -> (first rank row, number of rows)."""
        ...

    @property
    def row_slots(self) -> torch.Tensor:
        """[C] int32 on the device: the slot of each rank row, negative where free."""
        ...


@dataclass(frozen=True, eq=False)
class LowRankPools:
    """The rank rows of M maps over the same input. `rank_rows` may change between steps; None: not that map."""

    a: torch.Tensor  # [M, C, in]
    b: Sequence[torch.Tensor]  # M of [C, out]
    columns: Sequence[tuple[int, int]]  # M of [from, to) in the output
    rank_rows: Sequence[RankRowsOfSlots | None]  # M

    def __post_init__(self) -> None:
        """Raises ValueError where the pools do not fit each other: native kernels read them by address."""
        maps, capacity, _ = self.a.shape
        if not (maps == len(self.b) == len(self.columns) == len(self.rank_rows)):
            raise ValueError(f"pools of {maps} maps, {len(self.b)}, {len(self.columns)} and {len(self.rank_rows)}")
        for b, (begin, end) in zip(self.b, self.columns, strict=True):
            if b.shape != (capacity, end - begin) or b.dtype != self.a.dtype or not b.is_contiguous():
                raise ValueError(f"a pool of {tuple(b.shape)}, {b.dtype} beside {tuple(self.a.shape)}, {self.a.dtype}")
        if not self.a[0].is_contiguous():
            raise ValueError("the rank rows of a pool must be contiguous")

    def check(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Raises ValueError where x or y are not what these maps read and write."""
        fits = x.dtype == y.dtype == self.a.dtype and x.shape[1] == self.a.shape[2]
        if not (fits and y.shape[1] >= self.columns[-1][1]):
            raise ValueError(
                f"{tuple(x.shape)} {x.dtype} in and {tuple(y.shape)} {y.dtype} out, for pools of {tuple(self.a.shape)} "
                f"{self.a.dtype} with outputs up to {self.columns[-1][1]}"
            )


class Kernels(Protocol):
    """One implementation of the arithmetic; chosen once, at start."""

    def prepare(self, rows: int, segments: Sequence[SlotSegment], device: torch.device) -> Any:
        """What `add` needs to know of a step of so many rows, made once for all sites.

        `segments` are not empty, sorted and disjoint; rows in none of them have no adapter.
        """

    def add(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools, prepared: Any) -> None:
        """y[:, columns[m]] += (x @ a[m].T) @ b[m] in place, restricted to each row's own rank rows.

        x is [T, in], y [T, sum of outs], of the pools' dtype. Raises ValueError where they are not, or where T is not
        the number of rows that were prepared.
        """

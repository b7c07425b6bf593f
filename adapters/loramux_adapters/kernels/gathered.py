"""Gathered low-rank products in a handful of dense matrix products: the fast path in plain torch.

Few rows and many adapters (decode): one product against all rank rows in use, the foreign ones dropped, one product
back. Many rows per adapter (prefill): one pair of products per segment at its true rank. The cheaper way is chosen
once per step and content of rank rows. Products accumulate in float32 inside the library; shrunk values are in the
compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.kernels.prepared import PreparedStep, Segment
from loramux_adapters.kernels.protocol import LowRankPools, RankRowsOfSlots, SlotSegment

SEGMENT_COST = 4000
"""What walking one segment costs beyond its arithmetic, in tokens x rank rows of a product against the whole pool:
about 15 us on 2 cores with AMX, in which a pool product does some 4000 of them at in + out = 2000."""


@dataclass(frozen=True, eq=False)
class GatheredPlan:
    """Tokens before `first` have no adapter. Where `drop` is None the segments are walked one by one; otherwise the
    products run over the rank rows [low, high) at once and `drop` [T - first, high - low] is True where a rank row is
    not the token's own.
    """

    segments: tuple[Segment, ...]
    first: int = 0
    low: int = 0
    high: int = 0
    drop: torch.Tensor | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """One map: y [T, out], x [T, in], a [C, in], b [C, out]."""
        if self.drop is not None:
            # One product per map, not one for all siblings: a batched product and its transposed result cost a third
            # more at 16 rows and 16 adapters (11.6 against 8.6 ms a step of the 125M shape on one core).
            shrunk = x[self.first :] @ a[self.low : self.high].T
            shrunk.masked_fill_(self.drop, 0)  # selects: a NaN in a foreign rank row stays there
            y[self.first :].addmm_(shrunk, b[self.low : self.high])
            return
        for start, stop, row, rows in self.segments:
            y[start:stop].addmm_(x[start:stop] @ a[row : row + rows].T, b[row : row + rows])


Planner = Callable[[tuple[Segment, ...], RankRowsOfSlots], GatheredPlan]


def planner(rows: int, segments: Sequence[SlotSegment], device: torch.device) -> Planner:
    """Chooses the way of a step: compares tokens x rank rows of both."""
    token_slots: list[torch.Tensor] = []

    def plan(used: tuple[Segment, ...], rank_rows: RankRowsOfSlots) -> GatheredPlan:
        first = used[0].start
        low = min(segment.row for segment in used)
        high = max(segment.row + segment.rows for segment in used)
        walked = sum((segment.stop - segment.start) * segment.rows + SEGMENT_COST for segment in used)
        if walked < (rows - first) * (high - low):
            return GatheredPlan(used)
        if not token_slots:
            token_slots.append(_slots_of(rows, segments).to(device))
        drop = token_slots[0][first:, None] != rank_rows.row_slots[None, low:high]
        return GatheredPlan(used, first, low, high, drop)

    return plan


class GatheredKernels:
    """The default on every device without kernels of its own."""

    def prepare(self, rows: int, segments: Sequence[SlotSegment], device: torch.device) -> PreparedStep[GatheredPlan]:
        """See `Kernels.prepare`."""
        return PreparedStep(rows, segments, planner(rows, segments, device))

    def add(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools, prepared: PreparedStep[GatheredPlan]) -> None:
        """See `Kernels.add`."""
        for member, plan in enumerate(prepared.plans(y, x, pools)):
            if plan is not None:
                plan.add(y[:, slice(*pools.columns[member])], x, pools.a[member], pools.b[member])


def _slots_of(rows: int, segments: Sequence[SlotSegment]) -> torch.Tensor:
    """[rows] int32: the slot of each row, -1 where it has none."""
    slots = torch.full((rows,), -1, dtype=torch.int32)
    for start, stop, slot in segments:
        slots[start:stop] = slot
    return slots

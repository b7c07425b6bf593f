"""Gathered low-rank products in a handful of dense matrix products: the fast path in plain torch.

Few rows and many adapters (decode): one product against all rank rows in use, the foreign ones dropped, one product
back. Many rows per adapter (prefill): one pair of products per segment at its true rank. The cheaper way is chosen
once per step and layout. Products accumulate in float32 inside the library; shrunk values are in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.kernels.protocol import RankPlan, Segment

SEGMENT_COST = 4000
"""What walking one segment costs beyond its arithmetic, in tokens x rank rows of a product against the whole pool:
about 15 us on 2 cores with AMX, in which a pool product does some 4000 of them at in + out = 2000."""


class GatheredKernels:
    """The default on every device without kernels of its own."""

    def plan(self, segments: Sequence[Segment], token_slots: torch.Tensor, row_slots: torch.Tensor) -> RankPlan:
        """Compares tokens x rank rows of both ways."""
        first = segments[0].start
        low = min(segment.row for segment in segments)
        high = max(segment.row + segment.rows for segment in segments)
        walked = sum((segment.stop - segment.start) * segment.rows + SEGMENT_COST for segment in segments)
        drop = None
        if walked >= (token_slots.shape[0] - first) * (high - low):
            drop = token_slots[first:, None] != row_slots[None, low:high]
        return RankPlan(tuple(segments), first, low, high, drop)

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
        for member, plan in enumerate(plans):
            if plan is not None:
                _add_one(y[:, slice(*columns[member])], x, a[member], b[member], plan)


def _add_one(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: RankPlan) -> None:
    """One map: y [T, out], x [T, in], a [C, in], b [C, out]."""
    if plan.drop is not None:
        # One product per map, not one for all siblings: a batched product and its transposed result cost a third more
        # at 16 rows and 16 adapters (11.6 against 8.6 ms a step of the 125M shape on one core).
        shrunk = x[plan.first :] @ a[plan.low : plan.high].T
        shrunk.masked_fill_(plan.drop, 0)  # selects: a NaN in a foreign rank row stays there
        y[plan.first :].addmm_(shrunk, b[plan.low : plan.high])
        return
    for start, stop, row, rows in plan.segments:
        y[start:stop].addmm_(x[start:stop] @ a[row : row + rows].T, b[row : row + rows])

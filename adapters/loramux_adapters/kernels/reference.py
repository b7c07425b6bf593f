"""Plain torch, one adapter at a time in float32: the oracle of every faster kernel, and the deterministic mode.

Its products are row-invariant, so that a row's result depends on nothing but the row and its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.protocol import RankPlan, Segment


class ReferenceKernels:
    """Walks the segments; cost grows with the number of adapters in the step."""

    def plan(self, segments: Sequence[Segment], token_slots: torch.Tensor, row_slots: torch.Tensor) -> RankPlan:
        """Always segment by segment."""
        return RankPlan(tuple(segments), segments[0].start, 0, 0, None)

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
            if plan is None:
                continue
            begin, end = columns[member]
            for start, stop, row, rows in plan.segments:
                shrunk = invariant.linear(x[start:stop].float(), a[member, row : row + rows].float())
                delta = invariant.linear(shrunk, b[member][row : row + rows].float().T)
                y[start:stop, begin:end] = (y[start:stop, begin:end].float() + delta).to(y.dtype)

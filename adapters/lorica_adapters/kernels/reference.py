"""Plain torch, one adapter at a time in float32: the oracle of every faster kernel, and the deterministic mode.

Rows are padded to a multiple of 8, because float32 matrix products on CPUs are invariant to the number of rows only
from there on (measured; guarded by a test). So a row's result depends on nothing but the row and its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lorica_adapters.kernels.protocol import RankPlan, Segment

ROW_MULTIPLE = 8


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """[T, n] -> [T rounded up to a multiple of 8, n], padded with zeros."""
    missing = -x.shape[0] % ROW_MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


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
                x_rows = pad_rows(x[start:stop].float())
                shrunk = x_rows @ a[member, row : row + rows].float().T
                delta = (shrunk @ b[member][row : row + rows].float())[: stop - start]
                y[start:stop, begin:end] = (y[start:stop, begin:end].float() + delta).to(y.dtype)

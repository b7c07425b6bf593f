"""Plain torch, one adapter at a time in float32: the oracle of every faster kernel, and the deterministic mode.

Its products are row-invariant, so that a row's result depends on nothing but the row and its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.prepared import PreparedStep, Segment
from loramux_adapters.kernels.protocol import LowRankPools, SlotSegment


class ReferenceKernels:
    """Walks the segments; cost grows with the number of adapters in the step."""

    def prepare(
        self, rows: int, segments: Sequence[SlotSegment], device: torch.device
    ) -> PreparedStep[tuple[Segment, ...]]:
        """Segments as they are."""
        return PreparedStep(rows, segments, lambda used, _: used)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools, prepared: PreparedStep[tuple[Segment, ...]]
    ) -> None:
        """See `Kernels.add`."""
        for member, segments in enumerate(prepared.plans(y, x, pools)):
            begin, end = pools.columns[member]
            for start, stop, row, rows in segments or ():
                shrunk = invariant.linear(x[start:stop].float(), pools.a[member, row : row + rows].float())
                delta = invariant.linear(shrunk, pools.b[member][row : row + rows].float().T)
                y[start:stop, begin:end] = (y[start:stop, begin:end].float() + delta).to(y.dtype)

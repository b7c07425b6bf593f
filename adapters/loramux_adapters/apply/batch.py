"""Which adapter each row of one step uses: built once per step, read by every adapted module.

Hugging Face hands no extra arguments to projections, so modules read the step's AdapterBatch from a `StepCell` they
got at injection. Knows slots and layouts, no digests and no requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from loramux_adapters.frozen import DenseLinear
from loramux_adapters.kernels.protocol import Kernels, RankPlan, Segment


class SlotSegment(NamedTuple):
    """Rows [start, stop) belong to `slot`."""

    start: int
    stop: int
    slot: int


class Layout:
    """Where each slot's rank rows are in the pool of a module: slot -> (first row, number of rows).

    Immutable; modules whose slots lie alike share one, so that their plans are shared too.
    """

    def __init__(self, ranges: Mapping[int, tuple[int, int]], capacity: int, device: torch.device) -> None:
        self.ranges = dict(ranges)
        row_slots = torch.full((capacity,), -2, dtype=torch.int32)
        for slot, (row, rows) in self.ranges.items():
            row_slots[row : row + rows] = slot
        self.row_slots = row_slots.to(device)


class RowMap:
    """Rows of one kind (tokens of the step, or rows that get logits) and their slots.

    Rows without an adapter come first, rows of one slot lie together: see `segments_of`.
    """

    def __init__(self, slots: Sequence[int], kernels: Kernels, device: torch.device) -> None:
        self.segments = segments_of(slots)
        self._kernels = kernels
        self._token_slots = torch.tensor(slots, dtype=torch.int32, device=device) if self.segments else None
        self._plans: dict[Layout, RankPlan | None] = {}

    def plan(self, layout: Layout) -> RankPlan | None:
        """The step's plan for modules of this layout; None when no row has rank rows there."""
        if layout not in self._plans:
            self._plans[layout] = self._make_plan(layout)
        return self._plans[layout]

    def _make_plan(self, layout: Layout) -> RankPlan | None:
        used = [
            Segment(segment.start, segment.stop, *layout.ranges[segment.slot])
            for segment in self.segments
            if segment.slot in layout.ranges
        ]
        if not used or self._token_slots is None:
            return None
        return self._kernels.plan(used, self._token_slots, layout.row_slots)


def segments_of(slots: Sequence[int]) -> tuple[SlotSegment, ...]:
    """Runs of equal slot among the rows that have one. Raises ValueError unless base rows (-1) come first."""
    segments: list[SlotSegment] = []
    for row, slot in enumerate(slots):
        if segments and segments[-1].slot == slot:
            segments[-1] = SlotSegment(segments[-1].start, row + 1, slot)
        elif slot >= 0:
            segments.append(SlotSegment(row, row + 1, slot))
        elif segments:
            raise ValueError(f"row {row} has no adapter but follows rows that have one")
    return tuple(segments)


class MergedWeights(NamedTuple):
    """A merged adapter: replacement weights by group, see `loramux_adapters.apply.merge`."""

    digest: str
    weights: Mapping[str, DenseLinear]  # by group key


class AdapterBatch:
    """One step: `tokens` maps every row of the forward, `logits` the rows the head sees."""

    def __init__(self, tokens: RowMap, logits: RowMap, dense: MergedWeights | None = None) -> None:
        self.tokens, self.logits, self.dense = tokens, logits, dense


class StepCell:
    """Holds the AdapterBatch of the step that is running; one per injected model, one step at a time."""

    def __init__(self) -> None:
        self.batch: AdapterBatch | None = None

    @contextmanager
    def running(self, batch: AdapterBatch) -> Iterator[None]:
        """Sets the batch for the duration of one forward."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

"""Which adapter each row of one step uses: built once per step, read by every adapted module.

Hugging Face hands no extra arguments to projections, so modules read the step's AdapterBatch from a `StepCell` they
got at injection. Knows slots, no digests and no requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import NamedTuple

import torch

from loramux_adapters.frozen import DenseLinear
from loramux_adapters.kernels.protocol import Kernels, RankPlan, Segment
from loramux_adapters.parts.part import Kind
from loramux_adapters.parts.rank_rows import RankRows
from loramux_adapters.parts.registry import KINDS
from loramux_adapters.parts.site import SlotSegment

ALL_KINDS = frozenset(KINDS)


class RowMap:
    """Rows of one kind (tokens of the step, or rows that get logits) and their slots. Implements `StepRows`.

    `count` rows: those without an adapter come first, those of one slot lie together, see `segments_of`. `kinds` are
    those that act in this step, in order, and `input_kinds` those of them that change inputs: nothing else is asked at
    any module.
    """

    def __init__(
        self,
        slots: Sequence[int],
        kernels: Kernels,
        device: torch.device,
        kinds_of: Mapping[int, Set[Kind]] | None = None,
    ) -> None:
        """`kinds_of` says which kinds each slot has; None: maybe all."""
        self.count = len(slots)
        self.segments = segments_of(slots)
        self._kernels = kernels
        self._token_slots = torch.tensor(slots, dtype=torch.int32, device=device) if self.segments else None
        self._plans: dict[RankRows, RankPlan | None] = {}
        acting: Set[Kind] = frozenset()
        for segment in self.segments:
            acting = acting | (ALL_KINDS if kinds_of is None else kinds_of.get(segment.slot, frozenset()))
        self.kinds = tuple(kind for kind in KINDS if kind in acting)
        self.input_kinds = tuple(kind for kind in self.kinds if kind.changes_input)
        self.changes_inputs = bool(self.input_kinds)

    def plan(self, rank_rows: RankRows) -> RankPlan | None:
        """The step's plan for modules of these rank rows; None when no row has any there."""
        if rank_rows not in self._plans:
            self._plans[rank_rows] = self._make_plan(rank_rows)
        return self._plans[rank_rows]

    def add_low_rank(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        columns: Sequence[tuple[int, int]],
        rank_rows: Sequence[RankRows | None],
    ) -> None:
        """See `StepRows.add_low_rank`."""
        plans = [None if rows is None else self.plan(rows) for rows in rank_rows]
        if any(plan is not None for plan in plans):
            self._kernels.add_low_rank(y, x, a, b, columns, plans)

    def _make_plan(self, rank_rows: RankRows) -> RankPlan | None:
        used = [
            Segment(segment.start, segment.stop, *rank_rows.ranges[segment.slot])
            for segment in self.segments
            if segment.slot in rank_rows.ranges
        ]
        if not used or self._token_slots is None:
            return None
        return self._kernels.plan(used, self._token_slots, rank_rows.row_slots)


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

    def __init__(self, tokens: RowMap, logits: RowMap, merged: MergedWeights | None = None) -> None:
        self.tokens, self.logits, self.merged = tokens, logits, merged


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

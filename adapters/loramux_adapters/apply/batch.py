"""Which adapter each row of one step uses: built once per step, read by every adapted module.

Hugging Face hands no extra arguments to projections, so modules read the step's AdapterBatch from a `StepCell` they
got at injection. Knows slots, no digests and no requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import NamedTuple

import torch

from loramux_adapters.base.frozen import DenseLinear
from loramux_adapters.kernels.protocol import Kernels, LowRankPools, SlotSegment
from loramux_adapters.parts.part import Kind
from loramux_adapters.parts.registry import KINDS

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
        *,
        has_virtual_ids: bool = False,
    ) -> None:
        """`kinds_of` says which kinds each slot has; None: maybe all. `has_virtual_ids`: some are virtual tokens."""
        self.count = len(slots)
        self.segments = segments_of(slots)
        self._kernels = kernels
        self._prepared = kernels.prepare(self.count, self.segments, device) if self.segments else None
        acting: Set[Kind] = frozenset()
        for segment in self.segments:
            acting = acting | (ALL_KINDS if kinds_of is None else kinds_of.get(segment.slot, frozenset()))
        self.has_virtual_ids = has_virtual_ids
        self.kinds = tuple(kind for kind in KINDS if kind in acting and (has_virtual_ids or not kind.for_virtual_ids))
        self.input_kinds = tuple(kind for kind in self.kinds if kind.changes_input)
        self.changes_inputs = bool(self.input_kinds)
        self.changes_sublayers = any("sublayer" in kind.sites for kind in self.kinds)

    def add_low_rank(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> None:
        """See `StepRows.add_low_rank`."""
        if self.segments:
            self._kernels.add(y, x, pools, self._prepared)


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
    """One step: `tokens` maps every row of the forward, `logits` the rows the head sees.

    Rows that use `merged` weights come last in both; `shared_tokens` and `shared_logits` map those before them, and are
    the same maps where no row does. What is no linear map acts on all rows alike. `vocabulary` is that of the widest
    adapter whose rows are in the step, 0 where none is wider than the base.
    """

    def __init__(
        self,
        tokens: RowMap,
        logits: RowMap,
        merged: MergedWeights | None = None,
        *,
        shared_tokens: RowMap | None = None,
        shared_logits: RowMap | None = None,
        vocabulary: int = 0,
    ) -> None:
        self.vocabulary = vocabulary
        self.tokens, self.logits, self.merged = tokens, logits, merged
        self.shared_tokens = tokens if shared_tokens is None else shared_tokens
        self.shared_logits = logits if shared_logits is None else shared_logits


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

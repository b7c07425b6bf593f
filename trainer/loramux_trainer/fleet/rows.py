"""Which member each row of a micro-batch belongs to: built once per micro-batch, read by every site.

Rows without a member (the base's own, as a reference) come first; those of one member lie together. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from loramux_adapters.kernels.protocol import Kernels, LowRankPools, SlotSegment
from loramux_adapters.parts.rank_rows import RankRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.random import generator


@dataclass(frozen=True)
class Dropout:
    """Of one member's chunk. A mask is a function of seed, step, chunk and site, so nothing of it has to be kept."""

    share: float
    key: str  # seed, step and chunk

    def mask(self, site: str, like: torch.Tensor) -> torch.Tensor:
        """0 or 1 / (1 - share), as `like` [n, in]."""
        keep = 1.0 - self.share
        source = generator(self.key, site, like.device)
        return torch.empty_like(like).bernoulli_(keep, generator=source).div_(keep)

    def after(self, rows: int) -> Dropout:
        """For those of a chunk's rows that come after so many."""
        return Dropout(self.share, f"{self.key}/{rows}") if rows else self


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [start, stop) are one chunk of a member. `slot` tells members apart within the micro-batch."""

    start: int
    stop: int
    slot: int
    parts: StepParts
    dropout: Dropout | None = None

    @property
    def rows(self) -> slice:
        """As a slice."""
        return slice(self.start, self.stop)


class SpanRows:
    """All rows of one kind (tokens, or positions that get logits) and the spans among them."""

    def __init__(self, count: int, spans: Sequence[Span], kernels: Kernels, device: torch.device) -> None:
        """`spans` are sorted, disjoint and not empty."""
        self.count, self.spans = count, tuple(spans)
        self.first = spans[0].start if spans else count  # rows before it have no member, and need no gradient
        self._kernels, self._device = kernels, device
        segments = [SlotSegment(span.start, span.stop, span.slot) for span in spans]
        self._prepared = kernels.prepare(count, segments, device) if segments else None
        self._rank_rows: dict[tuple[tuple[int, int, int], ...], RankRows] = {}

    def rank_rows(self, places: Mapping[int, tuple[int, int]], capacity: int) -> RankRows:
        """The same object for the same content: kernels keep what they prepare by it. Slot -> (first row, rows)."""
        key = (*((slot, *place) for slot, place in places.items()), (-1, capacity, 0))
        if key not in self._rank_rows:
            self._rank_rows[key] = RankRows(places, capacity, self._device)
        return self._rank_rows[key]

    def add_low_rank(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> None:
        """See `Kernels.add`."""
        self._kernels.add(y, x, pools, self._prepared)

    def cut(self, start: int, stop: int) -> SpanRows:
        """Those of rows [start, stop), counted from there."""
        inside = [
            Span(
                max(span.start, start) - start,
                min(span.stop, stop) - start,
                span.slot,
                span.parts,
                None if span.dropout is None else span.dropout.after(max(start - span.start, 0)),
            )
            for span in self.spans
            if span.start < stop and span.stop > start
        ]
        return SpanRows(stop - start, inside, self._kernels, self._device)


@dataclass(eq=False)
class StepCell:
    """What the model's modules read of the running micro-batch. One per fleet, handed to them when they are made."""

    tokens: SpanRows | None = None
    lengths: tuple[int, ...] = ()  # of the sequences, in order
    ids: torch.Tensor | None = None  # [T]
    hidden: torch.Tensor | None = None  # [N, hidden] at the positions that get logits, once the head was reached
    tap: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """Enters every node that has trained tensors, so that those below which nothing is trained run backward too."""

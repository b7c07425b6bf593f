"""What one forward and one backward compute: sequences of several members as one packed row of tokens.

A *chunk* is what a member computes at once: it is cut by the member's own configuration, never by what others do, so
that its gradients have the same bits alone and in company. `pack` puts whole chunks into micro-batches. Plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from loramux_trainer.data.examples import Example, Unit
from loramux_trainer.fleet.rows import Dropout

Owner = TypeVar("Owner")


@dataclass(frozen=True, eq=False)
class Chunk(Generic[Owner]):
    """Sequences of one owner. `number` counts the owner's chunks in this step."""

    owner: Owner
    number: int
    sequences: tuple[Example, ...]
    units: tuple[Unit, ...] = ()  # that they are of
    indices: tuple[int, ...] | None = None  # of the units in the owner's training data, None of held-out ones
    reference: bool = False  # whether the base's own log-probabilities of them are wanted too
    virtual_tokens: int = 0  # positions before each sequence
    dropout: Dropout | None = None

    @property
    def tokens(self) -> int:
        """Positions that it takes."""
        own = sum(len(each.ids) for each in self.sequences)
        return own + self.virtual_tokens * len(self.sequences) + (own if self.reference else 0)


def pack(chunks: Sequence[Chunk[Owner]], budget: int) -> list[list[Chunk[Owner]]]:
    """Chunks in micro-batches of at most `budget` tokens, where a single one does not take more.

    Each goes into the first that has room and is not before one with an earlier chunk of the same owner: gradients are
    added up in the order of chunks.
    """
    bins: list[list[Chunk[Owner]]] = []
    room: list[int] = []
    earliest: dict[int, int] = {}
    for chunk in chunks:
        first = earliest.get(id(chunk.owner), 0)
        index = next((i for i in range(first, len(bins)) if room[i] >= chunk.tokens), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(budget)
        bins[index].append(chunk)
        room[index] -= chunk.tokens
        earliest[id(chunk.owner)] = index
    return bins


def cut_by_tokens(sequences: Sequence[int], budget: int, least: int = 1) -> Iterator[slice]:
    """Neighbors together as long as their tokens are within `budget`, but at least `least`; of fewer sequences all."""
    start, tokens = 0, 0
    for index, length in enumerate(sequences):
        if index >= start + least and len(sequences) - index >= least and tokens + length > budget:
            yield slice(start, index)
            start, tokens = index, 0
        tokens += length
    if start < len(sequences):
        yield slice(start, len(sequences))

"""Chunks into micro-batches: all of them once, under the budget, those of one owner in their order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_trainer.data.examples import Example
from loramux_trainer.fleet.micro_batch import Chunk, cut_by_tokens, pack


class Owner:
    """Owners are told apart by identity."""


def _chunk(owner: Owner, number: int, tokens: int) -> Chunk[Owner]:
    return Chunk(owner, number, (Example((0,) * tokens, (0,) * tokens),))


@given(st.lists(st.lists(st.integers(1, 40), max_size=5), max_size=6), st.integers(1, 60))
def test_pack(sizes: list[list[int]], budget: int) -> None:
    owners = [Owner() for _ in sizes]
    chunks = [_chunk(o, n, size) for o, own in zip(owners, sizes, strict=True) for n, size in enumerate(own)]
    bins = pack(chunks, budget)
    packed = [chunk for each in bins for chunk in each]
    assert sorted(map(id, packed)) == sorted(map(id, chunks))
    for each in bins:
        assert len(each) == 1 or sum(chunk.tokens for chunk in each) <= budget
    for owner in owners:
        assert [chunk.number for chunk in packed if chunk.owner is owner] == sorted(
            chunk.number for chunk in chunks if chunk.owner is owner
        )
    # No two neighbors of different owners alone would have fitted into one.
    firsts = [each[0] for each in bins]
    for before, after in zip(bins, firsts[1:], strict=False):
        if all(chunk.owner is not after.owner for chunk in packed[: packed.index(after)]):
            assert sum(chunk.tokens for chunk in before) + after.tokens > budget


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 60))
def test_cut_by_tokens(lengths: list[int], budget: int) -> None:
    parts = list(cut_by_tokens(lengths, budget))
    assert [length for part in parts for length in lengths[part]] == lengths
    for part in parts:
        assert len(lengths[part]) == 1 or sum(lengths[part]) <= budget
    for one, other in itertools.pairwise(parts):
        assert sum(lengths[one]) + lengths[other][0] > budget


@pytest.mark.parametrize(
    ("reference", "virtual", "tokens"), [(False, 0, 8), (True, 0, 16), (False, 3, 14), (True, 3, 22)]
)
def test_a_chunk_counts_what_it_takes(reference: bool, virtual: int, tokens: int) -> None:
    rows = tuple(Example((0,) * size, (0,) * size) for size in (5, 3))
    assert Chunk(Owner(), 0, rows, reference=reference, virtual_tokens=virtual).tokens == tokens

"""Rank rows and slots as integers, and host memory under its budget."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.row_space import RowSpace
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.spec import AdapterSpec

CAPACITY = 40
STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 20)), max_size=40)


def longest_free(taken: set[int]) -> int:
    runs = "".join("x" if row in taken else "." for row in range(CAPACITY)).split("x")
    return max(map(len, runs))


@given(STEPS)
def test_a_row_space_takes_the_lowest_free_run_and_only_free_rows(steps: list[tuple[bool, int, int]]) -> None:
    space, held, taken = RowSpace(CAPACITY), list[tuple[int, int]](), set[int]()
    for is_take, which, rows in steps:
        if is_take or not held:
            first = space.find(rows)
            assert (first is not None) == (longest_free(taken) >= rows)
            if first is None:
                continue
            run = set(range(first, first + rows))
            assert not run & taken
            assert all(set(range(start, start + rows)) & taken for start in range(first))
            space.take(first, rows)
            held.append((first, rows))
            taken |= run
        else:
            first, rows = held.pop(which % len(held))
            space.free(first, rows)
            taken -= set(range(first, first + rows))
        space.check()
        assert space.used == len(taken)


@given(STEPS, st.integers(1, 40), st.data())
def test_looking_as_if_some_were_gone_is_looking_after_they_went(
    steps: list[tuple[bool, int, int]], wanted: int, data: st.DataObject
) -> None:
    space, held = RowSpace(CAPACITY), list[tuple[int, int]]()
    for _, _, rows in steps:
        first = space.find(rows)
        if first is not None:
            space.take(first, rows)
            held.append((first, rows))
    leaving = data.draw(st.sets(st.sampled_from(held))) if held else set()
    expected = space.find(wanted, leaving)
    for first, rows in leaving:
        space.free(first, rows)
    assert space.find(wanted) == expected


def test_a_run_that_is_not_taken_cannot_be_freed() -> None:
    space = RowSpace(CAPACITY)
    space.take(0, 8)
    for run in ((0, 4), (8, 8)):
        with pytest.raises(ValueError, match="not in list"):
            space.free(*run)


def test_check_sees_overlap_and_overflow() -> None:
    for runs in (((0, 8), (4, 8)), ((36, 8),), ((0, 0),)):
        space = RowSpace(CAPACITY)
        for run in runs:
            space.take(*run)
        with pytest.raises(ValueError, match="overlap or leave"):
            space.check()


def test_a_table_takes_everything_or_nothing() -> None:
    table = SlotTable(["q", "v"], 16, 3, 100)
    assert table.try_take({"q": 8, "v": 16}, 60) is not None
    for needs, extra in (({"q": 8, "v": 8}, 0), ({"q": 16}, 0), ({"q": 8}, 41)):
        before = (table.numbers, table.rows_used)
        assert table.try_take(needs, extra) is None
        assert (table.numbers, table.rows_used) == before
        table.check()
    number, rows = table.try_take({"q": 8}, 40) or (-1, {})
    assert rows == {"q": (8, 8)}
    table.free(number)
    assert table.try_take({}, 0) is not None
    assert table.try_take({}, 0) is not None
    assert table.try_take({}, 0) is None  # three slots


@pytest.mark.parametrize(
    ("needs", "extra", "leaving", "fits"),
    [
        ({"q": 8}, 0, [], False),
        ({"q": 8}, 0, [0], True),
        ({"q": 16}, 0, [0], False),
        ({"q": 16}, 0, [0, 1], True),
        ({"q": 8}, 80, [0], False),
        ({"q": 8}, 80, [0, 1], True),
    ],
)
def test_it_foresees_what_eviction_brings(needs: dict[str, int], extra: int, leaving: list[int], fits: bool) -> None:
    table = SlotTable(["q"], 16, 2, 100)
    assert [(table.try_take({"q": 8}, 30) or (None,))[0] for _ in range(2)] == [0, 1]
    assert table.can_take_without(needs, extra, leaving) == fits
    for number in leaving:
        table.free(number)
    assert (table.try_take(needs, extra) is not None) == fits


def test_ranks_are_rounded_up_and_modules_without_rows_need_none() -> None:
    table = SlotTable(["q", "v"], 64, 1, 0)
    assert table.needs({"q": 1, "v": 9, "embed": 3}) == {"q": 8, "v": 16}
    assert table.can_ever_hold({"q": 64}, 0)
    assert not table.can_ever_hold({"q": 72}, 0)
    assert not table.can_ever_hold({}, 1)


@dataclass(frozen=True)
class Held:
    """`nbytes` of something."""

    nbytes: int
    spec: AdapterSpec


def held(nbytes: int, digest: str = "a") -> Held:
    return Held(nbytes, AdapterSpec(digest, "lora", None, False, {}, frozenset(), nbytes))


def test_host_memory_keeps_the_recently_used_within_its_budget() -> None:
    sizes = {"a": 40, "b": 40, "c": 40, "large": 101}
    reads: list[str] = []

    def read(digest: str) -> Held:
        reads.append(digest)
        return held(sizes[digest], digest)

    cache = HostCache(read, 100)
    for digest in ("a", "b", "a", "c"):
        assert cache.load(digest).spec.digest == digest
    assert reads == ["a", "b", "c"]
    assert [cache.size(digest) > 0 for digest in "abc"] == [True, False, True]
    assert cache.usage == (2, 80)
    assert cache.load("large").nbytes == 101  # read, not kept, and nobody leaves for it
    assert cache.usage == (2, 80)
    cache.discard("a")
    cache.discard("a")
    assert cache.usage == (1, 40)


def test_a_read_that_fails_holds_nothing() -> None:
    def read(digest: str) -> Held:
        raise AdapterNotFound("gone", subject=digest)

    cache = HostCache(read, 100)
    with pytest.raises(AdapterNotFound):
        cache.load("a")
    assert cache.usage == (0, 0)


def test_what_is_discarded_while_it_is_read_is_not_kept() -> None:
    reading, discarded = threading.Event(), threading.Event()

    def read(digest: str) -> Held:
        reading.set()
        assert discarded.wait(10)
        return held(10)

    cache = HostCache(read, 100)
    thread = threading.Thread(target=cache.load, args=("a",))
    thread.start()
    assert reading.wait(10)
    cache.discard("a")
    discarded.set()
    thread.join(10)
    assert cache.usage == (0, 0)


def test_what_is_offered_is_not_read_again() -> None:
    reads: list[str] = []

    def read(digest: str) -> Held:
        reads.append(digest)
        return held(60, digest)

    cache, offered = HostCache(read, 100), held(60, "a")
    cache.offer("a", offered)
    assert cache.load("a") is offered
    cache.load("b")  # "a" was used before it and leaves
    assert cache.load("a") is not offered
    assert reads == ["b", "a"]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["load", "offer", "discard"])), max_size=60))
def test_its_books_add_up(steps: list[tuple[str, str]]) -> None:
    sizes = {digest: 10 * (index + 1) for index, digest in enumerate("abcdef")}
    cache = HostCache(lambda digest: held(sizes[digest], digest), 100)
    for digest, step in steps:
        if step == "load":
            cache.load(digest)
            assert cache.size(digest)
        elif step == "offer":
            cache.offer(digest, held(sizes[digest], digest))
            assert cache.size(digest)
        else:
            cache.discard(digest)
            assert not cache.size(digest)
        kept = [each for each in sizes if cache.size(each)]
        assert cache.usage == (len(kept), sum(sizes[each] for each in kept))
        assert cache.usage[1] <= 100

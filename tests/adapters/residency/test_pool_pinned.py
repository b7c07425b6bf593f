"""Adapters that are to be kept: loaded though nobody asks, evicted last, and nobody pays for them with a turn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterIncompatible
from loramux_adapters.residency.pinned_set import LONGEST_SECONDS, RETRY_SECONDS
from loramux_adapters.residency.pool import READY_TICKS
from support.pool_world import World


def pin(world: World, *digests: str, retry: str | None = None) -> None:
    """The desired state, and the time it takes to come true."""
    world.pool.pin(frozenset(digests), retry)
    world.pool.poll()
    for _ in digests:
        world.settle()


def fill(world: World, *digests: str) -> None:
    """Each used in turn, the first the longest ago."""
    for digest in digests:
        world.bring(digest).release()
        world.pool.poll()


def test_it_is_loaded_though_nobody_asks(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.pool.pin(frozenset({"8-a", "8-b"}))
    assert world.notices == 1  # an idle engine must come and look
    assert world.pool.stats().loading == 0  # only the engine's thread changes anything
    world.pool.poll()
    world.settle()
    world.settle()
    assert world.resident("8-a", "8-b") == [True, True]
    stats = world.pool.stats()
    assert (stats.loads, stats.waits, stats.hits) == (2, 0, 0)
    assert caplog.text == ""


def test_one_is_loaded_at_a_time_and_a_request_waits_for_no_other() -> None:
    world = World(capacity=80, slots=10)
    world.pool.pin(frozenset(f"8-{letter}" for letter in "abcdef"))
    world.pool.poll()
    assert world.pool.try_acquire("8-asked") is None
    world.settle()
    assert world.pool.try_acquire("8-asked") is not None
    assert world.reads[:2] == ["8-a", "8-asked"]


def test_it_is_evicted_last() -> None:
    world = World(capacity=24)
    pin(world, "8-kept")
    fill(world, "8-a", "8-b")
    for digest in ("8-c", "8-d", "8-e"):
        fill(world, digest)
        assert world.resident("8-kept") == [True]
    assert world.resident("8-a", "8-b", "8-c") == [False, False, False]


def test_it_gives_way_where_nothing_else_can() -> None:
    """Or a desired state for as many as there is room for would starve all others."""
    world = World(capacity=16)
    pin(world, "8-a", "8-b")
    fill(world, "8-c")
    assert sorted(world.resident("8-a", "8-b")) == [False, True]
    world.pool.check()


def test_idle_others_that_cannot_make_room_alone_leave_with_it() -> None:
    world = World(capacity=24)
    pin(world, "8-kept")
    fill(world, "8-a")
    lease = world.bring("8-b")
    assert world.pool.try_acquire("16-big") is None
    world.settle()
    assert world.resident("8-kept", "8-a") == [False, False]
    lease.release()


def test_after_giving_way_it_comes_back_but_does_not_take_turns() -> None:
    world = World(capacity=8)
    pin(world, "8-kept")
    for _ in range(10):
        fill(world, "8-a")
    assert world.pool.stats().loads == 2  # otherwise each of the two would be loaded each time
    world.now += RETRY_SECONDS
    world.pool.poll()
    world.settle()
    assert world.resident("8-kept", "8-a") == [True, False]


def test_it_never_drives_out_what_is_leased_or_kept() -> None:
    world = World(capacity=16)
    lease = world.bring("8-leased")
    pin(world, "8-a", "8-b")
    assert world.resident("8-a", "8-b", "8-leased") == [True, False, True]
    for _ in range(3):
        world.now += RETRY_SECONDS
        world.pool.poll()
        world.settle()
    assert world.pool.stats().evictions == 0
    lease.release()
    world.pool.poll()
    world.settle()
    assert world.resident("8-a", "8-b") == [True, True]


def test_more_than_there_is_room_for_are_not_read_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World(capacity=16)
    pin(world, "8-a", "8-b", "8-c")
    for _ in range(5):
        for _ in range(READY_TICKS + 2):
            world.pool.poll()
        world.now += RETRY_SECONDS
        world.loader.do_all()
    assert world.reads == ["8-a", "8-b", "8-c"]
    assert caplog.text.count("8-c is pinned and finds no room") == 1
    assert world.pool.stats().loading == 0  # its bytes are the host tier's to keep or not
    world.now += RETRY_SECONDS
    pin(world, "8-b", "8-c", "8-0")  # a place has become free, for the one that waits
    assert world.resident("8-b", "8-c", "8-0") == [True, True, False]
    assert world.reads == ["8-a", "8-b", "8-c", "8-0"]  # c was in host memory


def test_a_failed_load_is_logged_and_nobodys_failure(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    pin(world, "8-a")
    assert "8-a is pinned and could not be loaded: the stored bytes do not match" in caplog.text
    del world.errors["8-a"]
    assert world.pool.try_acquire("8-a") is None  # a load of its own, no failure of another's
    world.settle()
    assert world.pool.try_acquire("8-a") is not None


def test_a_request_that_waits_for_the_load_is_told_of_its_failure() -> None:
    world = World()
    world.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    world.pool.pin(frozenset({"8-a"}))
    world.pool.poll()
    assert world.pool.try_acquire("8-a") is None
    world.settle()
    with pytest.raises(AdapterCorrupt):
        world.pool.try_acquire("8-a")


def test_what_keeps_failing_is_tried_less_and_less() -> None:
    world = World()
    world.errors["8-a"] = AdapterIncompatible("accepted for another base")
    pin(world, "8-a")
    tried = [0.0]
    while world.now < 3 * LONGEST_SECONDS:
        world.now += 10.0
        reads = len(world.reads)
        world.pool.poll()
        world.settle()
        if len(world.reads) > reads:
            tried.append(world.now)
    gaps = [after - before for before, after in pairwise(tried)]
    assert gaps[:3] == [RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS]
    assert max(gaps) == LONGEST_SECONDS
    del world.errors["8-a"]
    pin(world, "8-a")  # an unrelated change
    assert world.resident("8-a") == [False]
    pin(world, "8-a", retry="8-a")
    assert world.resident("8-a") == [True]


def test_a_withdrawn_desired_state_leaves_an_adapter_as_any_other() -> None:
    world = World(capacity=16)
    pin(world, "8-a")
    pin(world)
    fill(world, "8-b", "8-c")
    assert world.resident("8-a", "8-b", "8-c") == [False, True, True]
    world.now += RETRY_SECONDS
    world.settle()
    assert world.resident("8-a") == [False]


def test_a_discard_counts_more_than_a_desired_state_and_the_desired_state_remains() -> None:
    world = World()
    pin(world, "8-a")
    world.pool.discard("8-a")
    world.pool.poll()
    assert world.resident("8-a") == [False]
    world.settle()
    assert world.resident("8-a") == [True]
    assert world.reads == ["8-a", "8-a"]

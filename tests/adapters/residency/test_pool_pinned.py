"""Adapters that are to be kept: loaded though nobody asks, evicted last, and nobody pays for them with a turn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterIncompatible
from loramux_adapters.residency.pinned_set import LONGEST_SECONDS, RETRY_SECONDS
from loramux_adapters.residency.pool import READY_TICKS
from support.pool_harness import PoolHarness


def pin(harness: PoolHarness, *digests: str, retry: str | None = None) -> None:
    """The desired state, and the time it takes to come true."""
    harness.pool.pin(frozenset(digests), retry)
    harness.pool.poll()
    for _ in digests:
        harness.settle()


def fill(harness: PoolHarness, *digests: str) -> None:
    """Each used in turn, the first the longest ago."""
    for digest in digests:
        harness.bring(digest).release()
        harness.pool.poll()


def test_it_is_loaded_though_nobody_asks(caplog: pytest.LogCaptureFixture) -> None:
    harness = PoolHarness()
    harness.pool.pin(frozenset({"8-a", "8-b"}))
    assert harness.notices == 1  # an idle engine must come and look
    assert harness.pool.stats().loading == 0  # only the engine's thread changes anything
    harness.pool.poll()
    harness.settle()
    harness.settle()
    assert harness.resident("8-a", "8-b") == [True, True]
    stats = harness.pool.stats()
    assert (stats.loads, stats.waits, stats.hits) == (2, 0, 0)
    assert caplog.text == ""


def test_one_is_loaded_at_a_time_and_a_request_waits_for_no_other() -> None:
    harness = PoolHarness(capacity=80, slots=10)
    harness.pool.pin(frozenset(f"8-{letter}" for letter in "abcdef"))
    harness.pool.poll()
    assert harness.pool.try_acquire("8-asked") is None
    harness.settle()
    assert harness.pool.try_acquire("8-asked") is not None
    assert harness.reads[:2] == ["8-a", "8-asked"]


def test_it_is_evicted_last() -> None:
    harness = PoolHarness(capacity=24)
    pin(harness, "8-kept")
    fill(harness, "8-a", "8-b")
    for digest in ("8-c", "8-d", "8-e"):
        fill(harness, digest)
        assert harness.resident("8-kept") == [True]
    assert harness.resident("8-a", "8-b", "8-c") == [False, False, False]


def test_it_gives_way_where_nothing_else_can() -> None:
    """Or a desired state for as many as there is room for would starve all others."""
    harness = PoolHarness(capacity=16)
    pin(harness, "8-a", "8-b")
    fill(harness, "8-c")
    assert sorted(harness.resident("8-a", "8-b")) == [False, True]
    harness.pool.check()


def test_idle_others_that_cannot_make_room_alone_leave_with_it() -> None:
    harness = PoolHarness(capacity=24)
    pin(harness, "8-kept")
    fill(harness, "8-a")
    lease = harness.bring("8-b")
    assert harness.pool.try_acquire("16-big") is None
    harness.settle()
    assert harness.resident("8-kept", "8-a") == [False, False]
    lease.release()


def test_after_giving_way_it_comes_back_but_does_not_take_turns() -> None:
    harness = PoolHarness(capacity=8)
    pin(harness, "8-kept")
    for _ in range(10):
        fill(harness, "8-a")
    assert harness.pool.stats().loads == 2  # otherwise each of the two would be loaded each time
    harness.now += RETRY_SECONDS
    harness.pool.poll()
    harness.settle()
    assert harness.resident("8-kept", "8-a") == [True, False]


def test_it_never_drives_out_what_is_leased_or_kept() -> None:
    harness = PoolHarness(capacity=16)
    lease = harness.bring("8-leased")
    pin(harness, "8-a", "8-b")
    assert harness.resident("8-a", "8-b", "8-leased") == [True, False, True]
    for _ in range(3):
        harness.now += RETRY_SECONDS
        harness.pool.poll()
        harness.settle()
    assert harness.pool.stats().evictions == 0
    lease.release()
    harness.pool.poll()
    harness.settle()
    assert harness.resident("8-a", "8-b") == [True, True]


def test_more_than_there_is_room_for_are_not_read_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    harness = PoolHarness(capacity=16)
    pin(harness, "8-a", "8-b", "8-c")
    for _ in range(5):
        for _ in range(READY_TICKS + 2):
            harness.pool.poll()
        harness.now += RETRY_SECONDS
        harness.loader.do_all()
    assert harness.reads == ["8-a", "8-b", "8-c"]
    assert caplog.text.count("8-c is pinned and finds no room") == 1
    assert harness.pool.stats().loading == 0  # its bytes are the host tier's to keep or not
    harness.now += RETRY_SECONDS
    pin(harness, "8-b", "8-c", "8-0")  # a place has become free, for the one that waits
    assert harness.resident("8-b", "8-c", "8-0") == [True, True, False]
    assert harness.reads == ["8-a", "8-b", "8-c", "8-0"]  # c was in host memory


def test_a_failed_load_is_logged_and_nobodys_failure(caplog: pytest.LogCaptureFixture) -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    pin(harness, "8-a")
    assert "8-a is pinned and could not be loaded: the stored bytes do not match" in caplog.text
    del harness.errors["8-a"]
    assert harness.pool.try_acquire("8-a") is None  # a load of its own, no failure of another's
    harness.settle()
    assert harness.pool.try_acquire("8-a") is not None


def test_a_request_that_waits_for_the_load_is_told_of_its_failure() -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    harness.pool.pin(frozenset({"8-a"}))
    harness.pool.poll()
    assert harness.pool.try_acquire("8-a") is None
    harness.settle()
    with pytest.raises(AdapterCorrupt):
        harness.pool.try_acquire("8-a")


def test_what_keeps_failing_is_tried_less_and_less() -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = AdapterIncompatible("accepted for another base")
    pin(harness, "8-a")
    tried = [0.0]
    while harness.now < 3 * LONGEST_SECONDS:
        harness.now += 10.0
        reads = len(harness.reads)
        harness.pool.poll()
        harness.settle()
        if len(harness.reads) > reads:
            tried.append(harness.now)
    gaps = [after - before for before, after in pairwise(tried)]
    assert gaps[:3] == [RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS]
    assert max(gaps) == LONGEST_SECONDS
    del harness.errors["8-a"]
    pin(harness, "8-a")  # an unrelated change
    assert harness.resident("8-a") == [False]
    pin(harness, "8-a", retry="8-a")
    assert harness.resident("8-a") == [True]


def test_a_withdrawn_desired_state_leaves_an_adapter_as_any_other() -> None:
    harness = PoolHarness(capacity=16)
    pin(harness, "8-a")
    pin(harness)
    fill(harness, "8-b", "8-c")
    assert harness.resident("8-a", "8-b", "8-c") == [False, True, True]
    harness.now += RETRY_SECONDS
    harness.settle()
    assert harness.resident("8-a") == [False]


def test_a_discard_counts_more_than_a_desired_state_and_the_desired_state_remains() -> None:
    harness = PoolHarness()
    pin(harness, "8-a")
    harness.pool.discard("8-a")
    harness.pool.poll()
    assert harness.resident("8-a") == [False]
    harness.settle()
    assert harness.resident("8-a") == [True]
    assert harness.reads == ["8-a", "8-a"]

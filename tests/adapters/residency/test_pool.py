"""AdapterPool by example: what a caller is told, in which order adapters leave, what is given back."""

from __future__ import annotations

import pytest

from loramux_adapters.binding import Binding
from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterIncompatible, PoolExhausted
from loramux_adapters.residency.pool import FAILURE_SECONDS, READY_TICKS
from loramux_adapters.residency.tiers import ResidencyView
from support.pool_harness import PoolHarness


def test_waiting_never_reads_twice() -> None:
    harness = PoolHarness()
    assert [harness.pool.try_acquire("8-a") for _ in range(5)] == [None] * 5
    assert len(harness.loader.work) == 1
    harness.settle()
    leases = [harness.pool.try_acquire("8-a") for _ in range(3)]
    assert {lease.slot for lease in leases if lease} == {leases[0].slot if leases[0] else None}
    assert harness.reads == ["8-a"]
    assert harness.notices == 2  # read, written
    stats = harness.pool.stats()
    assert (stats.waits, stats.hits, stats.loads, stats.leases) == (1, 3, 1, 3)


def test_who_may_not_load_gets_what_is_there_and_moves_nothing() -> None:
    harness = PoolHarness()
    harness.bring("8-a").release()
    lease = harness.pool.try_acquire("8-a", may_load=False)
    assert lease is not None
    assert harness.pool.try_acquire("8-b", may_load=False) is None
    harness.settle()
    assert harness.reads == ["8-a"]
    assert (harness.pool.stats().loading, harness.pool.stats().waits) == (0, 1)


def test_a_failure_is_told_once_and_then_tried_again() -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = AdapterCorrupt("the stored bytes do not match", subject="8-a")
    assert harness.pool.try_acquire("8-a") is None
    harness.settle()
    with pytest.raises(AdapterCorrupt, match="do not match"):
        harness.pool.try_acquire("8-a")
    assert harness.pool.stats().load_failures == 1
    del harness.errors["8-a"]
    harness.bring("8-a")
    assert harness.reads == ["8-a"] * 2
    assert harness.resident("8-a") == [True]


def test_what_the_device_refuses_is_told_to_whoever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = PoolHarness()

    def refuse(_: object) -> None:
        raise AdapterIncompatible("a bias has no meaning there", subject="q")

    with monkeypatch.context() as patch:
        patch.setattr(harness.device, "cost", refuse)
        assert harness.pool.try_acquire("8-a") is None
        harness.settle()
        with pytest.raises(AdapterIncompatible, match="no meaning"):
            harness.pool.try_acquire("8-a")
    harness.pool.check()
    harness.bring("8-a")


def test_a_failure_nobody_asks_for_is_forgotten() -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    harness.pool.try_acquire("8-a")
    harness.settle()
    del harness.errors["8-a"]
    harness.now += FAILURE_SECONDS - 1
    harness.pool.poll()
    with pytest.raises(AdapterCorrupt):  # whoever asks in time is told
        harness.pool.try_acquire("8-a")
    harness.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    harness.pool.try_acquire("8-a")
    harness.settle()
    del harness.errors["8-a"]
    harness.now += FAILURE_SECONDS
    harness.pool.poll()
    assert harness.pool.try_acquire("8-a") is None  # loads, and raises nothing
    assert harness.reads == ["8-a"] * 2
    harness.settle()
    assert harness.reads == ["8-a"] * 3
    assert harness.resident("8-a") == [True]


def test_an_unforeseen_error_is_told_without_internals(caplog: pytest.LogCaptureFixture) -> None:
    harness = PoolHarness()
    harness.errors["8-a"] = RuntimeError("/home/somebody/secret")
    harness.pool.try_acquire("8-a")
    harness.settle()
    with pytest.raises(AdapterError, match="could not be loaded") as told:
        harness.pool.try_acquire("8-a")
    assert "secret" not in str(told.value)
    assert "secret" in caplog.text


def test_what_can_never_fit_is_refused_and_evicts_nobody() -> None:
    harness = PoolHarness()
    harness.bring("8-a").release()
    harness.pool.poll()
    assert harness.pool.try_acquire("40-b") is None
    harness.settle()
    with pytest.raises(PoolExhausted, match=r"40 rank rows.*budget of 32 rows.*--adapter-device-bytes"):
        harness.pool.try_acquire("40-b")
    assert harness.resident("8-a") == [True]


def test_what_has_no_rank_rows_is_told_of_its_own_budget() -> None:
    harness = PoolHarness()
    harness.device.extra_bytes = 500
    assert harness.pool.try_acquire("8-a") is None
    harness.settle()
    with pytest.raises(PoolExhausted, match=r"needs 500 bytes .*more than the 0 .*--adapter-extra-bytes"):
        harness.pool.try_acquire("8-a")


def test_the_longest_unused_leaves_first() -> None:
    harness = PoolHarness(capacity=24)
    for digest in ("8-a", "8-b", "8-c"):
        harness.bring(digest).release()
        harness.pool.poll()
    harness.bring("8-a").release()
    harness.pool.poll()
    harness.bring("8-d")
    assert harness.resident("8-a", "8-b", "8-c", "8-d") == [True, False, True, True]
    assert harness.pool.stats().evictions == 1


def test_nobody_is_evicted_in_vain() -> None:
    """An adapter that would not fit even without all idle ones waits, and the idle ones stay."""
    harness = PoolHarness(capacity=32)
    leased = harness.bring("16-leased")
    harness.bring("8-a").release()
    harness.bring("8-b").release()
    harness.pool.poll()
    for _ in range(4):
        assert harness.pool.try_acquire("24-big") is None
        harness.settle()
    assert harness.resident("8-a", "8-b") == [True, True]
    assert harness.pool.stats().evictions == 0
    leased.release()
    assert harness.pool.try_acquire("24-big") is None
    harness.settle()
    assert harness.pool.try_acquire("24-big") is not None


def test_holes_are_joined_before_an_adapter_is_refused_room() -> None:
    harness = PoolHarness(capacity=32)
    leases = [harness.bring(f"8-{letter}") for letter in "abcd"]
    leases[0].release()
    leases[2].release()
    harness.pool.poll()
    assert harness.pool.try_acquire("16-big") is None  # two holes of 8, not one of 16
    harness.settle()
    assert harness.pool.try_acquire("16-big") is None
    leases[1].release()
    assert harness.pool.try_acquire("16-big") is None
    harness.settle()
    assert harness.pool.try_acquire("16-big") is not None
    assert harness.resident("8-d") == [True]
    harness.pool.check()


def test_one_bound_in_this_step_waits_for_its_first_request() -> None:
    harness = PoolHarness(capacity=8)
    harness.pool.try_acquire("8-a")
    harness.pool.try_acquire("8-b")
    harness.loader.do_all()
    harness.pool.poll()
    harness.loader.do_all()
    harness.pool.poll()  # a is bound now
    assert harness.pool.try_acquire("8-b") is None
    assert harness.resident("8-a") == [True]
    lease = harness.pool.try_acquire("8-a")
    assert lease is not None
    lease.release()


def test_a_discarded_adapter_stays_until_its_last_lease_goes() -> None:
    harness = PoolHarness()
    first, second = harness.bring("8-a"), harness.bring("8-a")
    harness.pool.discard("8-a")
    harness.pool.poll()
    first.release()
    harness.pool.poll()
    assert harness.pool.residency("8-a") == ResidencyView("resident", second.slot, 1, host_bytes=10)
    assert harness.pool.take_gone() == ()
    before = harness.notices
    second.release()
    assert harness.notices == before + 1  # an idle engine must come and free it
    harness.pool.poll()
    assert harness.pool.residency("8-a") == ResidencyView("registered")
    assert (harness.pool.take_gone(), harness.pool.take_gone()) == (("8-a",), ())
    unbound, bound = harness.pool.take_bindings()
    assert (unbound, bound) == ((second.slot,), (Binding(second.slot, "8-a", {"q": (0, 8)}),))
    assert harness.pool.take_bindings() == ((), ())
    assert harness.host.usage == (0, 0)


def test_a_discard_during_the_load_lets_the_waiting_request_run_once() -> None:
    """It was accepted before the adapter was deleted."""
    harness = PoolHarness()
    assert harness.pool.try_acquire("8-a") is None
    harness.pool.discard("8-a")
    harness.settle()
    lease = harness.pool.try_acquire("8-a")
    assert lease is not None
    lease.release()
    harness.pool.poll()
    harness.pool.poll()
    assert harness.pool.residency("8-a").tier == "registered"
    assert harness.pool.stats().loading == 0


@pytest.mark.parametrize("is_discarded", [True, False])
def test_a_load_nobody_waits_for_any_more_is_given_up(is_discarded: bool) -> None:
    harness = PoolHarness(capacity=8)
    lease = harness.bring("8-a")
    assert harness.pool.try_acquire("8-b") is None
    harness.settle()  # read, but there is no room
    assert harness.pool.stats().loading == 1
    if is_discarded:
        harness.pool.discard("8-b")
    for _ in range(3 if is_discarded else READY_TICKS + 1):
        harness.pool.poll()
    assert harness.pool.stats().loading == 0
    assert bool(harness.host.size("8-b")) != is_discarded
    lease.release()


def test_a_lease_is_a_context_manager() -> None:
    harness = PoolHarness()
    with harness.bring("8-a") as lease:
        assert lease.digest == "8-a"
        assert harness.pool.stats().leases == 1
    assert harness.pool.stats().leases == 0
    assert harness.pool.residency("8-a") == ResidencyView("resident", lease.slot, 0, host_bytes=10)


def test_a_lease_that_is_released_again_gives_back_nobody_elses() -> None:
    harness = PoolHarness()
    first, second = harness.bring("8-a"), harness.bring("8-a")
    first.release()
    first.release()
    assert harness.pool.stats().leases == 1
    second.release()
    assert harness.pool.stats().leases == 0


def test_twice_as_many_adapters_as_slots_all_get_their_turn() -> None:
    harness = PoolHarness(capacity=32)
    names = [f"8-{index}" for index in range(8)]
    served = []
    for _ in range(40):
        for name in names:
            lease = harness.pool.try_acquire(name)
            if lease is not None:
                served.append(name)
                lease.release()
        harness.settle()
    assert {name: served.count(name) >= 5 for name in names} == dict.fromkeys(names, True)
    assert len(harness.reads) == 8  # host memory has room for all: the store is read once for each


def test_what_waits_is_read_ahead_a_few_at_a_time_and_takes_no_slot() -> None:
    harness = PoolHarness()
    harness.bring("8-here").release()
    digests = ["8-here", "8-a", "8-b", "8-c"]
    harness.pool.prefetch(digests)
    harness.pool.prefetch(digests)
    assert len(harness.loader.work) == 2
    harness.loader.do_all()
    harness.pool.prefetch(digests)
    harness.loader.do_all()
    harness.pool.prefetch(digests)
    assert harness.loader.work == []
    assert harness.reads == ["8-here", "8-a", "8-b", "8-c"]
    assert [harness.pool.residency(digest).tier for digest in digests] == ["resident", "loaded", "loaded", "loaded"]
    assert harness.pool.stats().loading == 0
    harness.bring("8-b").release()
    assert harness.reads.count("8-b") == 1
    harness.pool.check()


def test_a_read_ahead_that_fails_is_told_to_the_request_alone_and_not_repeated() -> None:
    harness = PoolHarness()
    harness.errors["8-bad"] = AdapterCorrupt("damaged")
    for _ in range(3):
        harness.pool.prefetch(["8-bad"])
        harness.loader.do_all()
        harness.pool.poll()
    assert harness.reads == ["8-bad"]
    assert harness.pool.try_acquire("8-bad") is None
    harness.settle()
    with pytest.raises(AdapterCorrupt):
        harness.pool.try_acquire("8-bad")
    del harness.errors["8-bad"]
    harness.pool.prefetch(["8-bad"])
    harness.loader.do_all()
    assert harness.pool.residency("8-bad").tier == "loaded"


def test_a_memory_that_is_too_small_for_all_that_waits_is_not_filled_in_circles() -> None:
    harness = PoolHarness()
    digests = [f"8-{number}" for number in range(150)]  # of which 100 fit into host memory
    for _ in range(400):
        harness.pool.prefetch(digests)
        harness.loader.do_all()
    assert sorted(harness.reads) == sorted(digests)


def test_a_request_that_asks_while_it_is_read_ahead_waits_for_one_read() -> None:
    harness = PoolHarness()
    harness.pool.prefetch(["8-a"])
    assert harness.pool.try_acquire("8-a") is None
    harness.settle()
    assert harness.pool.try_acquire("8-a") is not None
    assert harness.reads == ["8-a"]


def test_what_goes_while_it_is_read_ahead_does_not_come_into_memory() -> None:
    harness = PoolHarness()
    harness.pool.prefetch(["8-a"])
    harness.pool.discard("8-a")
    harness.pool.poll()
    assert harness.pool.take_gone() == ("8-a",)

"""AdapterPool by example: what a caller is told, in which order adapters leave, what is given back."""

from __future__ import annotations

import pytest

from loramux_adapters.binding import Binding
from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterIncompatible, PoolExhausted
from loramux_adapters.residency.pool import FAILURE_SECONDS, READY_TICKS
from loramux_adapters.residency.tiers import ResidencyView
from support.pool_world import World


def test_waiting_never_reads_twice() -> None:
    world = World()
    assert [world.pool.try_acquire("8-a") for _ in range(5)] == [None] * 5
    assert len(world.loader.work) == 1
    world.settle()
    leases = [world.pool.try_acquire("8-a") for _ in range(3)]
    assert {lease.slot for lease in leases if lease} == {leases[0].slot if leases[0] else None}
    assert world.reads == ["8-a"]
    assert world.notices == 2  # read, written
    stats = world.pool.stats()
    assert (stats.waits, stats.hits, stats.loads, stats.leases) == (1, 3, 1, 3)


def test_a_failure_is_told_once_and_then_tried_again() -> None:
    world = World()
    world.errors["8-a"] = AdapterCorrupt("the stored bytes do not match", subject="8-a")
    assert world.pool.try_acquire("8-a") is None
    world.settle()
    with pytest.raises(AdapterCorrupt, match="do not match"):
        world.pool.try_acquire("8-a")
    assert world.pool.stats().load_failures == 1
    del world.errors["8-a"]
    world.bring("8-a")
    assert world.reads == ["8-a"] * 2
    assert world.resident("8-a") == [True]


def test_what_the_device_refuses_is_told_to_whoever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def refuse(_: object) -> None:
        raise AdapterIncompatible("a bias has no meaning there", subject="q")

    with monkeypatch.context() as patch:
        patch.setattr(world.device, "cost", refuse)
        assert world.pool.try_acquire("8-a") is None
        world.settle()
        with pytest.raises(AdapterIncompatible, match="no meaning"):
            world.pool.try_acquire("8-a")
    world.pool.check()
    world.bring("8-a")


def test_a_failure_nobody_asks_for_is_forgotten() -> None:
    world = World()
    world.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    world.pool.try_acquire("8-a")
    world.settle()
    del world.errors["8-a"]
    world.now += FAILURE_SECONDS - 1
    world.pool.poll()
    with pytest.raises(AdapterCorrupt):  # whoever asks in time is told
        world.pool.try_acquire("8-a")
    world.errors["8-a"] = AdapterCorrupt("the stored bytes do not match")
    world.pool.try_acquire("8-a")
    world.settle()
    del world.errors["8-a"]
    world.now += FAILURE_SECONDS
    world.pool.poll()
    assert world.pool.try_acquire("8-a") is None  # loads, and raises nothing
    assert world.reads == ["8-a"] * 2
    world.settle()
    assert world.reads == ["8-a"] * 3
    assert world.resident("8-a") == [True]


def test_an_unforeseen_error_is_told_without_internals(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.errors["8-a"] = RuntimeError("/home/somebody/secret")
    world.pool.try_acquire("8-a")
    world.settle()
    with pytest.raises(AdapterError, match="could not be loaded") as told:
        world.pool.try_acquire("8-a")
    assert "secret" not in str(told.value)
    assert "secret" in caplog.text


def test_what_can_never_fit_is_refused_and_evicts_nobody() -> None:
    world = World()
    world.bring("8-a").release()
    world.pool.poll()
    assert world.pool.try_acquire("40-b") is None
    world.settle()
    with pytest.raises(PoolExhausted, match=r"40 rank rows.*budget of 32 rows.*--adapter-device-bytes"):
        world.pool.try_acquire("40-b")
    assert world.resident("8-a") == [True]


def test_the_longest_unused_leaves_first() -> None:
    world = World(capacity=24)
    for digest in ("8-a", "8-b", "8-c"):
        world.bring(digest).release()
        world.pool.poll()
    world.bring("8-a").release()
    world.pool.poll()
    world.bring("8-d")
    assert world.resident("8-a", "8-b", "8-c", "8-d") == [True, False, True, True]
    assert world.pool.stats().evictions == 1


def test_nobody_is_evicted_in_vain() -> None:
    """An adapter that would not fit even without all idle ones waits, and the idle ones stay."""
    world = World(capacity=32)
    leased = world.bring("16-leased")
    world.bring("8-a").release()
    world.bring("8-b").release()
    world.pool.poll()
    for _ in range(4):
        assert world.pool.try_acquire("24-big") is None
        world.settle()
    assert world.resident("8-a", "8-b") == [True, True]
    assert world.pool.stats().evictions == 0
    leased.release()
    assert world.pool.try_acquire("24-big") is None
    world.settle()
    assert world.pool.try_acquire("24-big") is not None


def test_holes_are_joined_before_an_adapter_is_refused_room() -> None:
    world = World(capacity=32)
    leases = [world.bring(f"8-{letter}") for letter in "abcd"]
    leases[0].release()
    leases[2].release()
    world.pool.poll()
    assert world.pool.try_acquire("16-big") is None  # two holes of 8, not one of 16
    world.settle()
    assert world.pool.try_acquire("16-big") is None
    leases[1].release()
    assert world.pool.try_acquire("16-big") is None
    world.settle()
    assert world.pool.try_acquire("16-big") is not None
    assert world.resident("8-d") == [True]
    world.pool.check()


def test_one_bound_in_this_step_waits_for_its_first_request() -> None:
    world = World(capacity=8)
    world.pool.try_acquire("8-a")
    world.pool.try_acquire("8-b")
    world.loader.do_all()
    world.pool.poll()
    world.loader.do_all()
    world.pool.poll()  # a is bound now
    assert world.pool.try_acquire("8-b") is None
    assert world.resident("8-a") == [True]
    lease = world.pool.try_acquire("8-a")
    assert lease is not None
    lease.release()


def test_a_discarded_adapter_stays_until_its_last_lease_goes() -> None:
    world = World()
    first, second = world.bring("8-a"), world.bring("8-a")
    world.pool.discard("8-a")
    world.pool.poll()
    first.release()
    world.pool.poll()
    assert world.pool.residency("8-a") == ResidencyView("resident", second.slot, 1)
    before = world.notices
    second.release()
    assert world.notices == before + 1  # an idle engine must come and free it
    world.pool.poll()
    assert world.pool.residency("8-a") == ResidencyView("registered")
    unbound, bound = world.pool.take_bindings()
    assert (unbound, bound) == ((second.slot,), (Binding(second.slot, "8-a", {"q": (0, 8)}),))
    assert world.pool.take_bindings() == ((), ())
    assert world.host.usage == (0, 0)


def test_a_discard_during_the_load_lets_the_waiting_request_run_once() -> None:
    """It was accepted before the adapter was deleted."""
    world = World()
    assert world.pool.try_acquire("8-a") is None
    world.pool.discard("8-a")
    world.settle()
    lease = world.pool.try_acquire("8-a")
    assert lease is not None
    lease.release()
    world.pool.poll()
    world.pool.poll()
    assert world.pool.residency("8-a").tier == "registered"
    assert world.pool.stats().loading == 0


@pytest.mark.parametrize("is_discarded", [True, False])
def test_a_load_nobody_waits_for_any_more_is_given_up(is_discarded: bool) -> None:
    world = World(capacity=8)
    lease = world.bring("8-a")
    assert world.pool.try_acquire("8-b") is None
    world.settle()  # read, but there is no room
    assert world.pool.stats().loading == 1
    if is_discarded:
        world.pool.discard("8-b")
    for _ in range(3 if is_discarded else READY_TICKS + 1):
        world.pool.poll()
    assert world.pool.stats().loading == 0
    assert world.host.holds("8-b") != is_discarded
    lease.release()


def test_a_lease_is_a_context_manager() -> None:
    world = World()
    with world.bring("8-a") as lease:
        assert lease.digest == "8-a"
        assert world.pool.stats().leases == 1
    assert world.pool.stats().leases == 0
    assert world.pool.residency("8-a") == ResidencyView("resident", lease.slot, 0)


def test_twice_as_many_adapters_as_slots_all_get_their_turn() -> None:
    world = World(capacity=32)
    names = [f"8-{index}" for index in range(8)]
    served = []
    for _ in range(40):
        for name in names:
            lease = world.pool.try_acquire(name)
            if lease is not None:
                served.append(name)
                lease.release()
        world.settle()
    assert {name: served.count(name) >= 5 for name in names} == dict.fromkeys(names, True)
    assert len(world.reads) == 8  # host memory has room for all: the store is read once for each

"""AdapterPool as a state machine: loads and copies end late, fail and are discarded while leases come and go and pins
change; the books add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_adapters.binding import Binding, RankRanges
from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterIncompatible, PoolExhausted
from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.pinned_set import LONGEST_SECONDS, RETRY_SECONDS
from loramux_adapters.residency.pool import FAILURE_SECONDS, READY_TICKS, AdapterPool, Lease
from loramux_adapters.residency.slots import Slot, SlotTable
from loramux_adapters.residency.tiers import CopyDone
from loramux_adapters.spec import AdapterSpec

CAPACITY, SLOTS, EXTRA = 64, 4, 100
SHAPES: dict[str, tuple[dict[str, int], int]] = {  # digest -> ranks, extra bytes
    "small": ({"q": 3}, 0),
    "wide": ({"q": 9, "v": 9}, 10),
    "other": ({"v": 40}, 0),
    "tall": ({"q": 60}, 0),
    "bias": ({}, 60),
    "embedding": ({"embed": 12, "q": 24}, 60),
    "too many rows": ({"q": 65}, 0),
    "too many bytes": ({"q": 1}, 101),
}
TOO_LARGE = {"too many rows", "too many bytes"}
DIGESTS = st.sampled_from(sorted(SHAPES))


@dataclass(frozen=True)
class FakeWeights:
    """Facts only."""

    spec: AdapterSpec
    nbytes: int = 50


class FakeDevice:
    """Remembers whose values are in each rank row; refuses what a real device could not survive."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, int], str] = {}
        self.copied: dict[int, tuple[str, RankRanges]] = {}
        self.bound: dict[int, tuple[str, RankRanges]] = {}
        self.staged: list[tuple[int, str, RankRanges, CopyDone]] = []
        self.failing: set[str] = set()  # in what the loader thread does
        self.failing_copies: set[str] = set()

    def cost(self, weights: FakeWeights) -> tuple[Mapping[str, int], int]:
        return weights.spec.ranks, SHAPES[weights.spec.digest][1]

    def stage(self, slot: int, weights: FakeWeights, rank_ranges: RankRanges, done: CopyDone) -> None:
        if weights.spec.digest in self.failing:
            raise AdapterIncompatible("not finite", subject=weights.spec.digest)
        self.staged.append((slot, weights.spec.digest, dict(rank_ranges), done))

    def copy(self, index: int) -> None:
        slot, digest, rows, done = self.staged.pop(index)
        assert slot not in self.bound
        cells = cells_of(rows)
        assert not cells & {cell for _, taken in self.bound.values() for cell in cells_of(taken)}
        for cell in cells:
            self.content[cell] = digest
        if digest in self.failing_copies:
            done(AdapterError("no memory", subject=digest))
            return
        self.copied[slot] = (digest, rows)
        done(None)

    def bind(self, binding: Binding) -> None:
        assert self.copied[binding.slot] == (binding.digest, binding.rank_ranges)
        assert binding.slot not in self.bound
        self.bound[binding.slot] = self.copied.pop(binding.slot)

    def unbind(self, slot: int) -> None:
        del self.bound[slot]


class Later(Executor):
    """Work is done when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[str, Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        digest = args[0] if isinstance(args[0], str) else args[0].digest
        self.work.append((digest, lambda: fn(*args, **kwargs)))
        return Future()


def cells_of(rows: RankRanges) -> set[tuple[str, int]]:
    return {(name, row) for name, (first, count) in rows.items() for row in range(first, first + count)}


class PoolMachine(RuleBasedStateMachine):
    """Everything an engine and its loader may do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.broken: set[str] = set()
        self.device, self.loader = FakeDevice(), Later()
        self.host: HostCache[FakeWeights] = HostCache(self.read, 160)
        self.table = SlotTable(["q", "v"], CAPACITY, SLOTS, EXTRA)
        self.pool: AdapterPool[FakeWeights] = AdapterPool(
            self.table, self.device, self.host, self.loader, lambda: None, lambda: self.now
        )
        self.leases: list[tuple[Lease, int]] = []
        self.asked: set[str] = set()  # by a request that was told nothing yet
        self.failed: set[str] = set()  # loads whose failure lies unread until the next poll
        self.may_have_failed: set[str] = set()  # loads that somebody had asked for
        self.desired: frozenset[str] = frozenset()
        self.kept: frozenset[str] = frozenset()  # the desired state of the last poll
        self.discarded: set[str] = set()
        self.acquiring = ""
        self.evict = self.pool._evict
        self.pool._evict = self.watch_evict  # type: ignore[method-assign]

    def watch_evict(self, slot: Slot) -> None:
        self.evict(slot)
        self.see_who_leaves(slot.digest)

    def see_who_leaves(self, digest: str) -> None:
        """A kept one leaves last, and for a request alone."""
        if digest not in self.kept or digest in self.discarded:
            return
        leased = {lease.digest for lease, _ in self.leases}
        others = set(self.pool._slots) - leased - self.kept - {self.acquiring}
        assert {other for other in others if self.pool._slots[other].bound_at != self.pool._tick} == set()
        assert self.asked

    def read(self, digest: str) -> FakeWeights:
        if digest in self.broken:
            raise AdapterCorrupt("the stored bytes do not match", subject=digest)
        ranks = SHAPES[digest][0]
        return FakeWeights(AdapterSpec(digest, "lora", None, False, ranks, frozenset(), 50))

    @rule(digest=DIGESTS)
    def acquire(self, digest: str) -> None:
        self.asked.add(digest)
        self.may_have_failed |= self.failed & {digest}
        try:
            try:
                lease = self.pool.try_acquire(digest)
            finally:
                self.execute()
        except PoolExhausted:
            assert digest in TOO_LARGE
            self.asked.discard(digest)
            return
        except AdapterError:
            assert digest in self.may_have_failed
            self.asked.discard(digest)
            return
        if lease is not None:
            self.asked.discard(digest)
            assert digest not in TOO_LARGE
            assert lease.digest == digest
            self.leases.append((lease, lease.slot))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        held = self.pool.stats().leases
        lease.release()
        assert self.pool.stats().leases == held

    @rule(
        ticks=st.sampled_from([1, 1, 1, 2, READY_TICKS + 2]),
        seconds=st.sampled_from([0.0, 0.1, FAILURE_SECONDS + 1, RETRY_SECONDS]),
    )
    def poll(self, ticks: int, seconds: float) -> None:
        self.now += seconds
        for _ in range(ticks):
            self.turn()

    def turn(self) -> None:
        self.kept = self.desired
        self.failed.clear()
        self.pool.poll()
        self.execute()

    def execute(self) -> None:
        """What a worker does with the next plan, before it copies anything."""
        unbind, bind = self.pool.take_bindings()
        for slot in unbind:
            self.device.unbind(slot)
        for binding in bind:
            self.device.bind(binding)

    @precondition(lambda self: self.loader.work)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self.do(data.draw(st.integers(0, len(self.loader.work) - 1)))

    def do(self, index: int) -> None:
        digest, work = self.loader.work.pop(index)
        if digest in self.broken | self.device.failing:
            self.failed.add(digest)
            self.may_have_failed |= self.asked & {digest}
        work()

    @precondition(lambda self: self.device.staged)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        self.copy_one(data.draw(st.integers(0, len(self.device.staged) - 1)))

    def copy_one(self, index: int) -> None:
        digest = self.device.staged[index][1]
        if digest in self.device.failing_copies:
            self.failed.add(digest)
            self.may_have_failed |= self.asked & {digest}
        self.device.copy(index)

    @rule(digest=DIGESTS)
    def insist(self, digest: str) -> None:
        """Asks until the adapter is there, has failed, or finds no room."""
        for _ in range(3):
            self.acquire(digest)
            self.do_all()
            self.turn()

    def do_all(self) -> None:
        while self.loader.work:
            self.do(0)
        while self.device.staged:
            self.copy_one(0)

    @rule(digest=DIGESTS)
    def discard(self, digest: str) -> None:
        self.discarded.add(digest)
        self.pool.discard(digest)

    @rule(digests=st.frozensets(DIGESTS), retry=st.none() | DIGESTS)
    def pin(self, digests: frozenset[str], retry: str | None) -> None:
        self.desired = digests
        self.pool.pin(digests, retry)

    @rule(digest=DIGESTS, where=st.sampled_from(["store", "device", "copy"]), is_broken=st.booleans())
    def break_or_mend(self, digest: str, where: str, is_broken: bool) -> None:
        members = {"store": self.broken, "device": self.device.failing, "copy": self.device.failing_copies}[where]
        (members.add if is_broken else members.discard)(digest)

    @invariant()
    def the_books_add_up(self) -> None:
        self.pool.check()
        stats = self.pool.stats()
        assert stats.leases == len(self.leases)
        assert stats.resident == len(self.device.bound) <= SLOTS
        assert 0 <= stats.rows_used <= CAPACITY
        assert sum(SHAPES[digest][1] for digest, _ in self.device.bound.values()) <= EXTRA
        assert self.host.usage[1] <= 160

    @invariant()
    def a_leased_adapter_stays_where_it_is(self) -> None:
        for lease, slot in self.leases:
            assert lease.slot == slot
            digest, rows = self.device.bound[slot]
            assert digest == lease.digest
            assert {self.device.content[cell] for cell in cells_of(rows)} <= {digest}
            assert {name: rows[name][1] for name in rows} == self.table.needs(SHAPES[digest][0])
            assert self.pool.residency(digest).tier == "resident"
            assert self.pool.residency(digest).slot == slot

    @invariant()
    def one_load_at_a_time_per_adapter(self) -> None:
        loading = [*(digest for digest, _ in self.loader.work), *(digest for _, digest, _, _ in self.device.staged)]
        assert all(count == 1 for count in Counter(loading).values())
        digests = [digest for digest, _ in self.device.bound.values()]
        assert len(digests) == len(set(digests))

    @invariant()
    def at_most_one_load_is_nobodys(self) -> None:
        assert sum(not load.is_asked for load in self.pool._loads.values()) <= 1

    def teardown(self) -> None:
        """Whatever happened: what is pinned and fits comes without a request; without leases and pins and after
        discarding all, nothing is held anywhere."""
        for lease, _ in self.leases:
            lease.release()
        self.leases.clear()
        self.broken.clear()
        self.device.failing.clear()
        self.device.failing_copies.clear()
        self.pin(frozenset({"small", "bias"}), None)
        self.now += LONGEST_SECONDS
        for _ in range(READY_TICKS + 10):
            self.now += 1.0
            self.do_all()
            self.turn()
        assert {"small", "bias"} <= {digest for digest, _ in self.device.bound.values()}
        self.pin(frozenset(), None)
        for digest in SHAPES:
            self.discard(digest)
        for _ in range(4):
            self.turn()
        stats = self.pool.stats()
        assert (stats.leases, stats.resident, stats.loading, stats.rows_used, stats.resident_bytes) == (0, 0, 0, 0, 0)
        assert self.host.usage == (0, 0)
        assert not self.device.bound
        assert not self.table.numbers
        self.pool.check()


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase

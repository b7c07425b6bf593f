"""Which adapters are on the device: leases, single-flight loads, an order in which idle ones leave, kept ones last.

Belongs to the engine thread, which never waits here: a loader thread reads and prepares, the device's owner copies, and
both report back through `poll`. Which slots count is recorded for that owner. Torch-free; tiers are injected.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from math import inf
from typing import Any, Generic, TypeVar

from loramux_adapters.binding import Binding, RankRanges
from loramux_adapters.errors import AdapterError, PoolExhausted
from loramux_adapters.residency.frequency import Frequency
from loramux_adapters.residency.loads import Load, Prefetch, Report
from loramux_adapters.residency.pinned_set import PinnedSet, Size
from loramux_adapters.residency.slots import Slot, SlotTable
from loramux_adapters.residency.tiers import DeviceTier, HostTier, PoolStats, ResidencyView, Weights

W = TypeVar("W", bound=Weights)

logger = logging.getLogger(__name__)

FAILURE_SECONDS = 5.0
"""How long a failed load is remembered for whoever asked; after that the next request tries again."""

READY_TICKS = 64
"""Steps that a read adapter without a slot waits for somebody to ask again; then it starts anew from host memory."""


class Lease:
    """The promise that an adapter stays in its slot until `release`; also a context manager."""

    def __init__(self, pool: AdapterPool[Any], slot: Slot) -> None:
        self._pool, self._slot, self._live = pool, slot, True

    @property
    def slot(self) -> int:
        """Where the adapter is."""
        return self._slot.number

    @property
    def digest(self) -> str:
        """Which adapter it is."""
        return self._slot.digest

    def release(self) -> None:
        """Gives the promise back; again is harmless."""
        if self._live:
            self._live = False
            self._pool._release(self._slot)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterPool(Generic[W]):
    """Slots under budgets. `notify` is called from any thread when `poll` has something to take in."""

    def __init__(
        self,
        table: SlotTable,
        device: DeviceTier[W],
        host: HostTier[W],
        loader: Executor,
        notify: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        frequency: Frequency | None = None,
    ) -> None:
        """With a `frequency` the most rarely used idle adapter goes first, else the least recently used one."""
        self._table, self._device, self._host, self._loader = table, device, host, loader
        self._notify, self._clock, self._frequency = notify, clock, frequency
        self._slots: dict[str, Slot] = {}
        self._loads: dict[str, Load[W]] = {}
        self._failures: dict[str, tuple[AdapterError, float]] = {}
        self._doomed: set[str] = set()  # to be freed as soon as nobody holds a lease
        self._pinned = PinnedSet()
        self._reports: deque[Report[W]] = deque()
        self._discards: deque[str] = deque()
        self._gone: list[str] = []
        self._prefetch = Prefetch(host, loader)
        self._bound: list[Binding] = []
        self._unbound: list[int] = []
        self._tick = 0
        self._stats = PoolStats(rows_capacity=table.capacity)

    def try_acquire(self, digest: str, *, may_load: bool = True) -> Lease | None:
        """A lease, or None while the adapter is on its way; starts the load if it `may_load`, and never blocks.

        Raises the AdapterError of a failed load, once.
        """
        slot = self._slots.get(digest)
        if slot is not None:
            slot.leases += 1
            slot.used_at, slot.was_leased = self._tick, True
            if self._frequency is not None:
                self._frequency.use(digest)
            self._count(hits=1)
            return Lease(self, slot)
        if digest in self._failures:
            error, _ = self._failures.pop(digest)
            raise error
        if not may_load:
            return None
        load = self._loads.get(digest)
        self._prefetch.asked(digest)
        if load is None:
            self._count(waits=1)
            self._start(digest, is_asked=True)
            return None
        load.is_asked, load.asked_at = True, self._tick
        if load.state == "ready":
            self._place(load)
        return None

    def prefetch(self, digests: Iterable[str]) -> None:
        """Brings what will be asked for soon into host memory, a few at a time; takes no slot. Never blocks."""
        for digest in digests:
            if digest not in self._slots and digest not in self._loads:
                self._prefetch.ask(digest)

    def poll(self) -> None:
        """Takes in what loaders have reported, what was discarded and what is to be kept; once per step."""
        self._tick += 1
        self._pinned.take_in(self._slots, self._clock())
        while self._reports:
            self._take_in(self._reports.popleft())
        while self._discards:
            self._doomed.add(self._discards.popleft())
        self._give_up_unasked()
        for digest in [digest for digest in self._doomed if digest not in self._loads]:
            slot = self._slots.get(digest)
            if slot is None or self._is_idle(slot):
                self._doomed.discard(digest)
                self._gone.append(digest)
                self._prefetch.asked(digest)
                if self._frequency is not None:
                    self._frequency.forget(digest)
                self._host.discard(digest)
                if slot is not None:
                    self._evict(slot)
                    self._pinned.went(digest, self._clock())
        self._bring_pinned()
        if self._failures:
            now = self._clock()
            self._failures = {d: (e, t) for d, (e, t) in self._failures.items() if now - t < FAILURE_SECONDS}

    def take_bindings(self) -> tuple[tuple[int, ...], tuple[Binding, ...]]:
        """(slots to unbind, then slots to bind) since the last call, for the next step."""
        unbound, bound = tuple(self._unbound), tuple(self._bound)
        self._unbound, self._bound = [], []
        return unbound, bound

    def take_gone(self) -> tuple[str, ...]:
        """Digests whose discarding came to its end since the last call."""
        gone, self._gone = tuple(self._gone), []
        return gone

    def discard(self, digest: str) -> None:
        """Frees an adapter's slot and host bytes once its last lease is released. Any thread."""
        self._discards.append(digest)
        self._notify()

    def pin(self, digests: frozenset[str], retry: str | None = None) -> None:
        """From now on `digests`, and no others, are loaded unasked and evicted last. Any thread.

        One that cannot come, for its load fails or there is no room, is tried again from time to time, and at once if
        it is `retry`.
        """
        self._pinned.reconcile(digests, retry)
        self._notify()

    def residency(self, digest: str) -> ResidencyView:
        """Where an adapter is at this moment. Any thread."""
        slot = self._slots.get(digest)
        host_bytes = self._host.size(digest)
        if slot is not None:
            return ResidencyView("resident", slot.number, slot.leases, host_bytes)
        return ResidencyView("loaded" if host_bytes else "registered", host_bytes=host_bytes)

    def stats(self) -> PoolStats:
        """Counts and gauges. Any thread; gauges may be a step apart."""
        slots = list(self._slots.values())
        return replace(
            self._stats,
            resident=len(slots),
            resident_bytes=sum(slot.nbytes for slot in slots),
            loading=len(self._loads),
            leases=sum(slot.leases for slot in slots),
            pinned=len(self._pinned),
            rows_used=self._table.rows_used,
        )

    def check(self) -> None:
        """Raises ValueError when the books do not add up. Engine thread."""
        self._table.check()
        self._pinned.check(self._slots)
        held = {slot.number for slot in self._slots.values()}
        held |= {load.slot.number for load in self._loads.values() if load.slot is not None}
        if held != self._table.numbers:
            raise ValueError(f"slots {sorted(self._table.numbers)} taken, {sorted(held)} known")

    # On the loader thread.

    def _read(self, digest: str) -> None:
        try:
            report = Report(digest, weights=self._host.load(digest))
        except Exception as error:
            report = Report(digest, error=_told(digest, error))
        self._take_report(report)

    def _stage(self, slot: Slot, weights: W) -> None:
        def done(error: AdapterError | None) -> None:
            self._take_report(Report(slot.digest, error=error))

        try:
            self._device.stage(slot.number, weights, slot.rows, done)
        except Exception as error:
            done(_told(slot.digest, error))

    def _take_report(self, report: Report[W]) -> None:
        self._reports.append(report)
        self._notify()

    # On the engine thread.

    def _start(self, digest: str, *, is_asked: bool) -> None:
        self._loads[digest] = Load(digest, self._clock(), is_asked, self._tick)
        self._loader.submit(self._read, digest)

    def _bring_pinned(self) -> None:
        """Loads absent ones that are to be kept, one at a time: whoever asks for another waits for one at most."""
        for load in self._loads.values():
            if not load.is_asked:
                if load.state == "ready":
                    self._place(load)
                return
        now = self._clock()
        due = self._pinned.find_due(now, self._loads)
        if due is None:
            return
        digest, size = due
        if size is None or self._table.can_take_without(*size, _numbers(self._idle(pinned=False))):
            self._start(digest, is_asked=False)
        else:
            self._pinned.found_no_room(digest, now, size)

    def _take_in(self, report: Report[W]) -> None:
        load = self._loads[report.digest]
        if report.error is not None:
            self._fail(load, report.error)
        elif load.state == "reading":
            load.weights, load.state = report.weights, "ready"
            self._place(load)
        elif load.slot is not None:
            self._bound.append(Binding(load.slot.number, load.digest, load.slot.rows))
            load.slot.used_at = load.slot.bound_at = self._tick
            self._slots[report.digest] = load.slot
            self._pinned.came(report.digest)
            del self._loads[report.digest]
            self._count(loads=1, load_seconds=self._clock() - load.started)

    def _place(self, load: Load[W]) -> None:
        """Gives a read adapter a slot, evicting idle ones; leaves it `ready` when all are leased."""
        weights = load.weights
        if weights is None:
            raise ValueError(f"{load.digest} has not been read")
        try:
            ranks, extra_bytes = self._device.cost(weights)
        except AdapterError as error:
            self._fail(load, error)
            return
        load.size = needs, _ = self._table.needs(ranks), extra_bytes
        if not self._table.can_ever_hold(needs, extra_bytes):
            self._fail(load, self._too_large(needs, extra_bytes))
            return
        taken = self._table.try_take(needs, extra_bytes)
        if taken is None:
            taken = self._take_from_idle(load.size, may_take_pinned=load.is_asked)
        if taken is None:
            return
        number, rows = taken
        load.slot, load.state = Slot(number, load.digest, rows, weights.spec.nbytes), "copying"
        self._loader.submit(self._stage, load.slot, weights)

    def _take_from_idle(self, size: Size, *, may_take_pinned: bool) -> tuple[int, RankRanges] | None:
        """Evicts idle slots until there is room; none at all where that cannot help, kept ones where nothing else can.

        A kept adapter gives way to a request, or others would starve, but never to another kept one.
        """
        idle = self._idle(pinned=False)
        if not self._table.can_take_without(*size, _numbers(idle)):
            if not may_take_pinned:
                return None
            idle += self._idle(pinned=True)
            if not self._table.can_take_without(*size, _numbers(idle)):
                return None
        for slot in idle:
            self._evict(slot)
            self._pinned.gave_way(slot.digest, self._clock())
            taken = self._table.try_take(*size)
            if taken is not None:
                return taken
        return None

    def _give_up_unasked(self) -> None:
        """Forgets read adapters that wait for a slot although whoever wanted them has gone, or nobody asked."""
        for load in list(self._loads.values()):
            ticks = 1 if load.digest in self._doomed else READY_TICKS
            if load.state == "ready" and self._tick - load.asked_at > ticks:
                del self._loads[load.digest]
                if not load.is_asked and load.digest in self._pinned:
                    logger.warning("adapter %s is pinned and finds no room on the device", load.digest)
                    self._pinned.found_no_room(load.digest, self._clock(), load.size)

    def _is_idle(self, slot: Slot) -> bool:
        """Without leases; one bound in this very step waits for its first request."""
        return not slot.leases and slot.bound_at != self._tick

    def _idle(self, *, pinned: bool) -> list[Slot]:
        """Idle slots of adapters that are to be kept, or of the others; those to evict first come first."""
        idle = [
            slot for slot in self._slots.values() if self._is_idle(slot) and (slot.digest in self._pinned) == pinned
        ]
        return sorted(idle, key=self._worth)

    def _worth(self, slot: Slot) -> tuple[float, int]:
        if self._frequency is None:
            return 0.0, slot.used_at
        # One that was just brought for a request waits for it, however rarely it was used before.
        is_new = not slot.was_leased and self._tick - slot.bound_at <= READY_TICKS
        return inf if is_new else self._frequency.weight(slot.digest), slot.used_at

    def _evict(self, slot: Slot) -> None:
        self._unbound.append(slot.number)
        self._table.free(slot.number)
        del self._slots[slot.digest]
        self._count(evictions=1)

    def _release(self, slot: Slot) -> None:
        slot.leases -= 1
        if slot.digest in self._doomed:
            self._notify()

    def _fail(self, load: Load[W], error: AdapterError) -> None:
        if load.slot is not None:
            self._table.free(load.slot.number)
        del self._loads[load.digest]
        if load.is_asked:
            self._failures[load.digest] = (error, self._clock())
        if load.digest in self._pinned:
            logger.warning("adapter %s is pinned and could not be loaded: %s", load.digest, error)
            self._pinned.failed(load.digest, self._clock())
        self._count(load_failures=1)

    def _too_large(self, needs: Mapping[str, int], extra_bytes: int) -> PoolExhausted:
        largest = max(needs.values(), default=0)
        if extra_bytes > self._table.extra_budget:
            return PoolExhausted(
                f"the adapter needs {extra_bytes} bytes of the device beside rank rows (weights of its own, token "
                f"rows, gains), more than the {self._table.extra_budget} that are there for all adapters",
                remedy="raise --adapter-extra-bytes, and --adapter-device-bytes, of which it is a part",
            )
        return PoolExhausted(
            f"the adapter needs {largest} rank rows per module, more than the whole device budget of "
            f"{self._table.capacity} rows",
            remedy="raise --adapter-device-bytes",
        )

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{key: getattr(self._stats, key) + value for key, value in more.items()})


def _told(digest: str, error: Exception) -> AdapterError:
    """What whoever asked is told; of an error that was not foreseen, nothing but that it came."""
    if isinstance(error, AdapterError):
        return error
    logger.error("loading adapter %s failed", digest, exc_info=error)
    return AdapterError("the adapter could not be loaded", subject=digest)


def _numbers(slots: Iterable[Slot]) -> set[int]:
    return {slot.number for slot in slots}

"""An adapter pool without bytes: slots, leases, LRU, and loads that end when a test says so."""

from __future__ import annotations

from collections.abc import Iterable

from loramux_adapters.binding import Binding
from loramux_adapters.errors import AdapterError


class FakeLease:
    """A promise of one slot."""

    def __init__(self, pool: FakePool, digest: str, slot: int) -> None:
        self.digest = digest
        self.slot = slot
        self._pool: FakePool | None = pool

    def release(self) -> None:
        """Give it back, once."""
        if self._pool is not None:
            self._pool.leases[self.digest] -= 1
            self._pool = None


class FakePool:
    """Behaves as `AdapterPool` does: `try_acquire` starts the load, `poll` makes reported loads visible.

    With `at_once` a load is over when it starts. A slot is evicted only without leases, least recently used first.
    """

    def __init__(self, slots: int, *, at_once: bool = False) -> None:
        self.slots: list[str | None] = [None] * slots
        self.leases: dict[str, int] = {}
        self.loading: list[str] = []
        self.asked: list[str] = []
        self._at_once = at_once
        self._reported: dict[str, AdapterError | None] = {}
        self._errors: dict[str, AdapterError] = {}
        self._used: dict[str, int] = {}
        self.gone: list[str] = []
        self.prefetched: list[str] = []

    def digest_of(self, slot: int) -> str | None:
        """The adapter in `slot`."""
        return self.slots[slot]

    def try_acquire(self, digest: str, *, may_load: bool = True) -> FakeLease | None:
        """See `engine.leases.Adapters`."""
        self.asked.append(digest)
        if digest in self._errors:
            raise self._errors.pop(digest)
        if digest not in self.slots and not (may_load and self._start(digest)):
            return None
        if digest in self.loading:
            return None
        self.leases[digest] = self.leases.get(digest, 0) + 1
        self._used[digest] = len(self.asked)
        return FakeLease(self, digest, self.slots.index(digest))

    def prefetch(self, digests: Iterable[str]) -> None:
        """Remembers what was asked for last."""
        self.prefetched = list(digests)

    def poll(self) -> None:
        """See `engine.leases.Adapters`."""
        for digest, error in self._reported.items():
            self.loading.remove(digest)
            if error is not None:
                self.slots[self.slots.index(digest)] = None
                self._errors[digest] = error
        self._reported.clear()

    def take_bindings(self) -> tuple[tuple[int, ...], tuple[Binding, ...]]:
        """Nothing: the runner looks into the slots."""
        return (), ()

    def take_gone(self) -> tuple[str, ...]:
        """As a test says."""
        gone, self.gone = tuple(self.gone), []
        return gone

    def check(self) -> None:
        """No books."""

    def report(self, digest: str, error: AdapterError | None = None) -> None:
        """The load of `digest` is over: visible at the next poll."""
        self._reported[digest] = error

    def report_all(self) -> None:
        """Every load under way is over."""
        for digest in self.loading:
            self._reported.setdefault(digest, None)

    @property
    def leased(self) -> int:
        """Leases not given back."""
        return sum(self.leases.values())

    def _start(self, digest: str) -> bool:
        free = [slot for slot, held in enumerate(self.slots) if held is None]
        idle = [held for held in self.slots if held and not self.leases.get(held) and held not in self.loading]
        if free:
            slot = free[0]
        elif idle:
            slot = self.slots.index(min(idle, key=lambda held: self._used.get(held, 0)))
        else:
            return False
        self.slots[slot] = digest
        if not self._at_once:
            self.loading.append(digest)
        return True

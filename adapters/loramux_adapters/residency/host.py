"""Adapters in host memory under a byte budget: the least recently or most rarely used leave. Thread-safe; no torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from loramux_adapters.residency.frequency import Frequency
from loramux_adapters.residency.tiers import Weights

W = TypeVar("W", bound=Weights)


class HostCache(Generic[W]):
    """Implements `HostTier` over `read`, which verifies and parses from the store (and may raise AdapterError)."""

    def __init__(self, read: Callable[[str], W], budget_bytes: int, frequency: Frequency | None = None) -> None:
        """With a `frequency` the most rarely used goes first, else the least recently used one."""
        self._read, self._budget = read, budget_bytes
        self._frequency = frequency
        self._held: OrderedDict[str, W] = OrderedDict()
        self._bytes = 0
        self._discards = 0
        self._lock = threading.Lock()

    def load(self, digest: str) -> W:
        """From memory or from the store; an adapter larger than the whole budget is read but not kept."""
        with self._lock:
            if self._frequency is not None:
                self._frequency.use(digest)
            held = self._held.get(digest)
            if held is not None:
                self._held.move_to_end(digest)
                return held
            discards = self._discards
        weights = self._read(digest)  # outside the lock: slow
        self._keep(digest, weights, discards)
        return weights

    def offer(self, digest: str, weights: W) -> None:
        """Weights that were read elsewhere, as if they had been loaded now."""
        with self._lock:
            if self._frequency is not None:
                self._frequency.use(digest)
            discards = self._discards
        self._keep(digest, weights, discards)

    def size(self, digest: str) -> int:
        """Bytes it takes in memory now, 0 if it is not there."""
        held = self._held.get(digest)
        return 0 if held is None else held.nbytes

    def discard(self, digest: str) -> None:
        """Frees it, if held."""
        with self._lock:
            self._discards += 1
            if self._frequency is not None:
                self._frequency.forget(digest)
            held = self._held.pop(digest, None)
            if held is not None:
                self._bytes -= held.nbytes

    @property
    def usage(self) -> tuple[int, int]:
        """(adapters, bytes) held."""
        with self._lock:
            return len(self._held), self._bytes

    def _keep(self, digest: str, weights: W, discards: int) -> None:
        size = weights.nbytes
        with self._lock:
            # What was being read while something was discarded may be what was discarded.
            if size > self._budget or digest in self._held or discards != self._discards:
                return
            self._held[digest] = weights
            self._bytes += size
            while self._bytes > self._budget:
                self._bytes -= self._held.pop(self._find_victim()).nbytes

    def _find_victim(self) -> str:
        """Of equal ones the least recently used."""
        return next(iter(self._held)) if self._frequency is None else min(self._held, key=self._frequency.weight)

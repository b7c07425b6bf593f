"""Counts per key with a bounded number of keys: the busiest have a series of their own, the rest share `other`.

Every series only grows while it exists, as a counter must: a key counts for itself from the
moment it gets its place, and for `other` before and after.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

OTHER = "other"
_DECAY_EVERY = 4096  # additions between two halvings of the scores
_LEAD = 2.0  # a newcomer must be this much busier than the idlest, or places would flutter


class TopSeries:
    """Thread-safe. `limit` keys at most have their own series."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._own: dict[str, float] = {}
        self._other = 0.0
        self._scores: dict[str, float] = {}  # of keys with and without a place
        self._additions = 0

    def add(self, key: str, amount: float) -> None:
        """Count `amount` for `key`."""
        with self._lock:
            self._scores[key] = self._scores.get(key, 0.0) + 1.0
            self._additions += 1
            if key not in self._own:
                self._promote(key)
            if key in self._own:
                self._own[key] += amount
            else:
                self._other += amount
            if self._additions % _DECAY_EVERY == 0 or len(self._scores) > 8 * self._limit + 64:
                self._decay()

    def read(self) -> dict[str, float]:
        """Counts by key, `other` last."""
        with self._lock:
            return {**self._own, OTHER: self._other}

    def drop(self, keys: Iterable[str]) -> None:
        """What the keys stand for is gone: they have no series of their own any more."""
        with self._lock:
            for key in keys:
                self._own.pop(key, None)
                self._scores.pop(key, None)

    def _promote(self, key: str) -> None:
        """Give `key` a place when one is free or its holder is much idler."""
        if len(self._own) < self._limit:
            self._own[key] = 0.0
        elif self._own:
            idlest = min(self._own, key=lambda held: self._scores.get(held, 0.0))
            if self._scores[key] > _LEAD * self._scores.get(idlest, 0.0) + 1.0:
                del self._own[idlest]
                self._own[key] = 0.0

    def _decay(self) -> None:
        """Halve the scores and drop idle keys, so that the table stays small and follows the present."""
        halved = {key: score / 2 for key, score in self._scores.items()}
        self._scores = {key: score for key, score in halved.items() if score >= 1.0 or key in self._own}

"""How often adapters were used lately: each use counts half as much after `HALF_LIFE` more uses of any. Numbers only.

Once used and never again (a scan over many adapters) weighs less than what comes again and again, and what was popular
long ago fades. Also remembers some that are in no tier now, or what returns would begin from nothing.
"""

from __future__ import annotations

from math import inf, log2
from typing import Final

HALF_LIFE: Final = 1024.0
"""Uses. In `tests/adapters/residency/test_eviction.py` a quarter of it and four times it keep a little less."""

_MOST: Final = 8192  # remembered


class Frequency:
    """By digest. Not thread-safe: whoever evicts by it has one of its own."""

    def __init__(self) -> None:
        self._uses = 0
        # log2 of the count that was left at a use, and how late that was: their order is the same at every moment.
        self._weights: dict[str, float] = {}

    def use(self, digest: str) -> None:
        """It was used now."""
        self._uses += 1
        now = self._uses / HALF_LIFE
        left = 2.0 ** (self._weights.get(digest, -inf) - now)
        self._weights[digest] = log2(left + 1.0) + now
        if len(self._weights) > _MOST:
            kept = sorted(self._weights, key=self._weights.__getitem__)[_MOST // 2 :]
            self._weights = {digest: self._weights[digest] for digest in kept}

    def weight(self, digest: str) -> float:
        """What is used more often weighs more; minus infinity for what is not known."""
        return self._weights.get(digest, -inf)

    def forget(self, digest: str) -> None:
        """It is gone for good."""
        self._weights.pop(digest, None)

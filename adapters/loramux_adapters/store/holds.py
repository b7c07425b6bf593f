"""Who holds which version's bytes, counted by digest, in memory: holds end with the process.

Knows no catalog. `lock` makes "look up and hold" and "decide what to remove" exclude each other.
"""

from __future__ import annotations

import threading
from collections import Counter


class Holds:
    """Every method is called with `lock` held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._orphans: frozenset[str] = frozenset()

    def __contains__(self, digest: str) -> bool:
        return digest in self._counts

    def add(self, digest: str) -> None:
        """One more."""
        self._counts[digest] += 1

    def drop(self, digest: str) -> bool:
        """One less; whether this was the last hold on an orphan. RuntimeError if there is none: a bug."""
        if digest not in self._counts:
            raise RuntimeError(f"release of {digest[:12]} without a hold")
        self._counts[digest] -= 1
        if self._counts[digest]:
            return False
        del self._counts[digest]
        return digest in self._orphans

    def set_orphans(self, digests: frozenset[str]) -> None:
        """Say which held digests nothing else keeps."""
        self._orphans = digests

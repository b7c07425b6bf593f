"""Uses that accepted requests have taken and that are not in the catalog yet, in memory: they end with the process.

Knows no catalog: how many are left is told to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Open:
    """While uses are on their way into the catalog this says what is left, or they would be counted twice, or never."""

    left: int
    taken: int = 0


class Uses:
    """By the id of a lifetime. Every method is called with the lock of `Holds` held."""

    def __init__(self) -> None:
        self._open: dict[int, _Open] = {}

    def take(self, lifetime: int, left: int) -> bool:
        """Take a use, `left` being what the catalog says now; False if none is left. Owes one `end`."""
        entry = self._open.get(lifetime) or _Open(left)
        if entry.left <= 0:
            return False
        entry.left -= 1
        entry.taken += 1
        self._open[lifetime] = entry
        return True

    def end(self, lifetime: int, *, counted: bool) -> None:
        """A use is in the catalog, or was none. RuntimeError if none was taken: a bug."""
        entry = self._open.get(lifetime)
        if entry is None:
            raise RuntimeError("a use was ended that nobody took")
        entry.taken -= 1
        entry.left += not counted
        if not entry.taken:
            del self._open[lifetime]

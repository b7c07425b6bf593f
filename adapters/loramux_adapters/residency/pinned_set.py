"""Which adapters are to stay on the device, and when one that is not there is worth a try.

`reconcile` is for any thread, the rest belongs to the engine thread. Knows no slot and no load: the pool says what came
and what went.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

Size = tuple[Mapping[str, int], int]
"""Rank rows per linear module, and bytes beside them."""

RETRY_SECONDS = 30.0
"""How long one that found no room or gave way is left alone, and one whose load failed for the first time."""

LONGEST_SECONDS = 3600.0
"""How long one is left alone whose loads keep failing: each time twice as long as before, up to this."""


@dataclass
class _Absent:
    """Desired and not on the device. `size` is known once it has been read."""

    due: float
    size: Size | None = None
    retry_seconds: float = RETRY_SECONDS  # after the next failure


class PinnedSet:
    """The desired state as the engine thread last took it in, and what of it is absent."""

    def __init__(self) -> None:
        self._desired: frozenset[str] = frozenset()
        self._retry: deque[str] = deque()
        self._digests = self._desired
        self._absent: dict[str, _Absent] = {}

    def reconcile(self, digests: frozenset[str], retry: str | None) -> None:
        """All that is to be pinned from now on; `retry` need not wait if it was left alone."""
        self._desired = digests
        if retry is not None:
            self._retry.append(retry)

    def take_in(self, present: Collection[str], now: float) -> None:
        """Make the latest state the one that counts; `present` are on the device."""
        desired = self._desired
        if desired is not self._digests:
            for digest in self._absent.keys() - desired:
                del self._absent[digest]
            for digest in sorted(desired - self._digests - set(present)):
                self._absent[digest] = _Absent(now)
            self._digests = desired
        while self._retry:
            absent = self._absent.get(self._retry.popleft())
            if absent is not None:
                absent.due = now

    def __contains__(self, digest: str) -> bool:
        return digest in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def find_due(self, now: float, loading: Collection[str]) -> tuple[str, Size | None] | None:
        """The absent one to try now, that which has been due the longest, and its size if it is known."""
        due = [(digest, a) for digest, a in self._absent.items() if a.due <= now and digest not in loading]
        if not due:
            return None
        digest, absent = min(due, key=lambda entry: entry[1].due)
        return digest, absent.size

    def came(self, digest: str) -> None:
        """It is on the device."""
        self._absent.pop(digest, None)

    def went(self, digest: str, now: float) -> None:
        """It has left the device."""
        if digest in self._digests:
            self._absent[digest] = _Absent(now)

    def gave_way(self, digest: str, now: float) -> None:
        """It has left the device for another, with which it would take turns if it came back at once."""
        self.went(digest, now + RETRY_SECONDS)

    def found_no_room(self, digest: str, now: float, size: Size | None) -> None:
        """It was read and could not be placed, or would not be if it were read again."""
        absent = self._absent.get(digest)
        if absent is not None:
            absent.due, absent.size = now + RETRY_SECONDS, size

    def failed(self, digest: str, now: float) -> None:
        """Its load failed."""
        absent = self._absent.get(digest)
        if absent is not None:
            absent.due = now + absent.retry_seconds
            absent.retry_seconds = min(2 * absent.retry_seconds, LONGEST_SECONDS)

    def check(self, present: Collection[str]) -> None:
        """Raises ValueError unless each is either present or absent."""
        if self._absent.keys() != self._digests - set(present):
            raise ValueError(f"{sorted(self._absent)} absent, {sorted(self._digests - set(present))} not present")

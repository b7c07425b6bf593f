"""Who is served first, who gives way, and how often a request may be skipped.

Knows no blocks and no budget.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from operator import attrgetter

from loramux_server.engine.request import Request

LOADS_AHEAD = 4
"""Adapters that are loaded beyond those that the free places of a step can use, so that no place waits for a load.

Each takes the slot of an idle adapter. Without a limit, with ten times as many active adapters as slots and no more
places than those, one load in seven was evicted before its request could run, and the 95th percentile of waiting was a
quarter longer (`tests/server/engine/test_more_adapters_than_slots.py`, in steps).
"""

_order = attrgetter("order")


class FirstComeFirstServed:
    """By priority, then arrival. A preempted request keeps its place, so nobody is sent back twice for one arrival.

    The first of all can always run: whoever is behind it gives way, and alone it fits.
    """

    def __init__(self) -> None:
        self._waiting: list[Request] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting[:])

    def add(self, request: Request) -> None:
        """Take the place `request.order` gives."""
        insort(self._waiting, request, key=_order)

    def remove(self, request: Request) -> None:
        """Leave the queue."""
        remove_ordered(self._waiting, request)

    def find_victim(self, running: Sequence[Request]) -> Request:
        """The last in order."""
        return max(running, key=_order)


def insert_ordered(requests: list[Request], request: Request) -> None:
    """Put `request` into a list kept by `order`."""
    insort(requests, request, key=_order)


def remove_ordered(requests: list[Request], request: Request) -> None:
    """Take `request` out of a list kept by `order`."""
    index = bisect_left(requests, request.order, key=_order)
    if index == len(requests) or requests[index] is not request:
        raise ValueError(f"{request.key} is not in the list")
    del requests[index]


class AdapterAdmission:
    """One pass over the waiting requests, in order: who may ask for a lease.

    A request whose adapter is not ready is skipped by at most `bound` later requests with other
    adapters (its aging bound). After that no lease is granted behind it until it has its own: leases end with their
    requests, so a slot comes free, and nobody else takes it. Requests for the base take no slot and
    always pass. The bound holds among requests of one priority; a higher one goes first by definition.
    """

    def __init__(self, bound: int, tries: int) -> None:
        self._bound = bound
        self._tries = tries
        self._skipped: list[Request] = []
        self._not_ready: set[str] = set()
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        """Whether the pool has been asked for as many adapters as one pass may start loading."""
        return len(self._not_ready) >= self._tries

    def may_load(self, places: int) -> bool:
        """Whether the adapter asked for next may be loaded, where `places` more requests can run now."""
        return len(self._not_ready) < places + LOADS_AHEAD

    def may_ask(self, request: Request) -> bool:
        """Whether the pool may be asked on behalf of `request`, which needs an adapter."""
        return not self._is_closed and request.digest not in self._not_ready

    def skip(self, request: Request) -> None:
        """`request` stays behind: its adapter is not ready, or it may not ask."""
        if request.digest is not None and not self._is_closed:
            self._not_ready.add(request.digest)
        self._skipped.append(request)
        self._is_closed = self._is_closed or request.skips >= self._bound

    def admit(self, request: Request) -> None:
        """`request` got its lease: everyone skipped before it in this pass was skipped once more."""
        request.skips = 0
        for other in self._skipped:
            other.skips += 1
            self._is_closed = self._is_closed or other.skips >= self._bound

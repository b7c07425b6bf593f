"""Work of many owners on a few threads: owners take turns, and slow ones leave a thread to the others.

Lives on the event loop. Knows nothing of the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from loramux_server.errors import Overloaded

T = TypeVar("T")

_SLOW_SECONDS = 0.25  # of an owner's work, on average
_REMEMBERED = 1024  # owners
_RETRY_SECONDS = 1.0


@dataclass
class _Owner:
    last_turn: int = 0
    seconds: float = 0.0  # of its work, the last counting half


@dataclass(eq=False)
class _Turn:
    owner: str
    granted: asyncio.Future[None]


class Turns:
    """At most `threads` pieces of work at once; of those that wait, one of the owner whose last turn is longest ago.

    Owners whose work takes long leave one thread free: nobody waits for them but each other, and for one piece of an
    owner that was not known as slow yet.
    """

    def __init__(self, threads: int, most_waiting: int, most_of_one: int, name: str) -> None:
        """`most_waiting` pieces may be there in all, `most_of_one` owner; those at work are among them."""
        self._free, self._most, self._most_of_one = threads, most_waiting, most_of_one
        self._kept_free = min(1, threads - 1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._there: Counter[str] = Counter()
        self._waiting: list[_Turn] = []
        self._owners: OrderedDict[str, _Owner] = OrderedDict()  # the last to get a turn last
        self._number = 0

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """What `work` gives, on a thread. Raises Overloaded at once where too many wait, and what it raises."""
        if self._there.total() >= self._most or self._there[owner] >= self._most_of_one:
            raise Overloaded(_RETRY_SECONDS)
        loop = asyncio.get_running_loop()
        turn = _Turn(owner, loop.create_future())
        self._there[owner] += 1
        self._waiting.append(turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._leave(owner)
            else:
                self._end(owner, None)
            raise
        begun = time.monotonic()
        job = self._threads.submit(work)

        def end(_: object) -> None:  # on the thread, when it is free indeed: a caller that goes away frees none
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._end, owner, time.monotonic() - begun)

        job.add_done_callback(end)
        return await asyncio.wrap_future(job)

    def _grant(self) -> None:
        while self._free and (turn := self._next()) is not None:
            self._waiting.remove(turn)
            self._free -= 1
            self._number += 1
            self._owner(turn.owner).last_turn = self._number
            turn.granted.set_result(None)

    def _next(self) -> _Turn | None:
        firsts: dict[str, _Turn] = {}
        for turn in self._waiting:
            if not turn.granted.done():  # canceled, and about to leave
                firsts.setdefault(turn.owner, turn)
        may = [turn for turn in firsts.values() if self._free > self._kept_free or not self._is_slow(turn.owner)]
        return min(may, key=lambda turn: self._last_turn(turn.owner), default=None)

    def _is_slow(self, owner: str) -> bool:
        known = self._owners.get(owner)
        return known is not None and known.seconds > _SLOW_SECONDS

    def _last_turn(self, owner: str) -> int:
        known = self._owners.get(owner)
        return 0 if known is None else known.last_turn

    def _owner(self, owner: str) -> _Owner:
        known = self._owners.setdefault(owner, _Owner())
        self._owners.move_to_end(owner)
        if len(self._owners) > _REMEMBERED:
            self._owners.popitem(last=False)
        return known

    def _end(self, owner: str, seconds: float | None) -> None:
        if seconds is not None:
            known = self._owner(owner)
            known.seconds = (known.seconds + seconds) / 2
        self._free += 1
        self._leave(owner)

    def _leave(self, owner: str) -> None:
        self._there[owner] -= 1
        if not self._there[owner]:
            del self._there[owner]
        self._grant()

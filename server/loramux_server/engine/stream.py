"""The events of one submission on the asyncio side, for one reader.

Keeps the promise of exactly one terminal event per choice, whatever the engine sends, and aborts
the submission when its reader is cancelled. Knows no text: stop strings are found by the reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from loramux_server.requests import Submission, TokenEvent


class RequestStream:
    """Async iterator over the events of all choices; ends after the last choice's terminal event.

    Not read, it holds the events of this submission only, at most `max_tokens` a choice. Use it in
    `async with`, or call `abort` when leaving early.
    """

    def __init__(self, submission: Submission, on_abort: Callable[[], None], on_finish: Callable[[int], None]) -> None:
        self.submission = submission
        self._on_abort = on_abort
        self._on_finish = on_finish
        self._open = set(range(submission.n))  # choices the reader has to hear the end of
        self._events: deque[TokenEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._aborted = False

    @property
    def is_open(self) -> bool:
        """Whether more events may come."""
        return bool(self._open)

    @property
    def is_aborted(self) -> bool:
        """Whether its reader, or its caller, has asked for its end."""
        return self._aborted

    def push(self, event: TokenEvent) -> None:
        """Take in one event; after a choice's end nothing of it is kept."""
        if event.choice not in self._open:
            return
        if event.terminal:
            self._open.discard(event.choice)
        self._events.append(event)
        self._wake()

    def finish(self, choice: int) -> None:
        """The reader ends `choice` itself, having found a stop string: it emits STOP, the engine retires the request.

        Events of the choice not read yet are dropped. Harmless after the choice's end.
        """
        self._events = deque(event for event in self._events if event.choice != choice)
        if choice in self._open:
            self._open.discard(choice)
            self._on_finish(choice)
            self._wake()

    def abort(self) -> None:
        """Ask the engine to end what is left; the events still come, the terminal ones ABORTED."""
        if self._open and not self._aborted:
            self._aborted = True
            self._on_abort()

    def take_ready(self) -> list[TokenEvent]:
        """All events that are here already, without waiting."""
        events = list(self._events)
        self._events.clear()
        return events

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if not self._open:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("a request stream has one reader")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.abort()
                raise
            finally:
                self._waiter = None
        return self._events.popleft()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

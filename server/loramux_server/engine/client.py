"""The engine as asyncio code sees it: submit, read events, abort.

Lives on one event loop; only `publish` and `end` are called from the engine thread. Refuses what
is too much or too large before the engine hears of it. Knows no text and no wire format.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.mailbox import Abort, Command, Finish, Mailbox, MailboxClosed, MailboxFull, Submit
from loramux_server.engine.scheduler import Routed
from loramux_server.engine.stats import NoObserver, Observer
from loramux_server.engine.stream import RequestStream
from loramux_server.errors import (
    Draining,
    DuplicateRequest,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
    status_of,
)
from loramux_server.requests import FinishReason, RequestFailure, Submission, TokenEvent

_SHORTEST_RETRY = 0.05
_LONGEST_RETRY = 30.0
_FIRST_RETRY = 1.0
_WEIGHT_OF_NEWEST = 0.1


@dataclass
class _Ticket:
    """A submission the engine has not ended yet. `owed` are the choices whose terminal event is still to come."""

    stream: RequestStream
    owed: set[int]
    is_cut_off: bool = False


class EngineClient:
    """One engine's client side. Make it on the event loop it serves."""

    def __init__(
        self,
        mailbox: Mailbox,
        limits: EngineLimits,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mailbox = mailbox
        self._limits = limits
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._observer = observer if observer is not None else NoObserver()
        self._clock = clock
        self._tickets: dict[int, _Ticket] = {}
        self._names: dict[tuple[str, str], int] = {}  # (tenant, request id) -> ticket, while a reader waits
        self._last_ticket = 0
        self._live = 0  # choices in `owed`
        self._cut_off = 0
        self._refusal: Callable[[], Unavailable] | None = None  # set once nothing is taken any more
        self._finish_interval: float | None = None  # seconds between two ends, smoothed
        self._last_end: float | None = None

    def submit(self, submission: Submission) -> RequestStream:
        """Hand `submission` over and return its events.

        Raises InvalidRequest if it can never fit, DuplicateRequest while another of its id is open,
        Overloaded when the queue is full, Draining or Unavailable when nothing is taken any more.
        """
        try:
            return self._submit(submission)
        except LoramuxError as error:
            self._observer.rejected(status_of(error).reason)
            raise

    def abort(self, tenant: str, request_id: str) -> bool:
        """End a request of `tenant`; its reader hears ABORTED. False if none of that id is open."""
        ticket = self._names.get((tenant, request_id))
        if ticket is None:
            return False
        self._tickets[ticket].stream.abort()
        return True

    @property
    def running_requests(self) -> int:
        """Submissions that run or wait: the engine has not ended them yet."""
        return len(self._tickets)

    @property
    def cut_off_requests(self) -> int:
        """Submissions that ended before their end because the engine did, those that were aborted anyway aside."""
        return self._cut_off

    def drain(self) -> None:
        """Refuse new submissions with Draining; those under way go on."""
        if self._refusal is None:
            self._refusal = Draining

    def fail_all(self, failure: RequestFailure) -> None:
        """End every open choice with `failure` and refuse new ones: the engine is gone, or hangs."""
        if self._refusal is not Draining:
            self._refusal = lambda: Unavailable(failure.message)
        tickets, self._tickets = self._tickets, {}
        self._names.clear()
        self._live = 0
        for ticket in tickets.values():
            self._cut_off += not ticket.stream.is_aborted
            for choice in sorted(ticket.owed):
                ticket.stream.push(TokenEvent(choice, failure=failure))

    # From the engine thread.

    def publish(self, events: Sequence[Routed]) -> None:
        """Deliver one step's events: one wake-up of the loop, however many they are."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def end(self, failure: RequestFailure) -> None:
        """The engine has ended: nobody is left waiting."""
        self._loop.call_soon_threadsafe(self.fail_all, failure)

    # On the event loop.

    def _submit(self, submission: Submission) -> RequestStream:
        if self._refusal is not None:
            raise self._refusal()
        if submission.n < 1:
            raise InvalidRequest("sampling.n", f"must be at least 1, not {submission.n}")
        self._limits.check_fits(submission)
        name = (submission.tenant, submission.request_id)
        if name in self._names:
            raise DuplicateRequest(submission.request_id)
        if self._live + submission.n > self._limits.max_live:
            raise self._overloaded()
        self._last_ticket += 1
        number = self._last_ticket
        try:
            self._mailbox.put(Submit(number, submission, self._clock()))
        except MailboxFull:
            raise self._overloaded() from None
        except MailboxClosed:
            raise Unavailable("the engine has ended") from None
        stream = RequestStream(
            submission, lambda: self._send(Abort(number)), lambda choice: self._finish(number, choice)
        )
        self._tickets[number] = _Ticket(stream, set(range(submission.n)))
        self._names[name] = number
        self._live += submission.n
        return stream

    def _deliver(self, events: Sequence[Routed]) -> None:
        for number, event in events:
            ticket = self._tickets.get(number)
            if ticket is None:
                continue
            ticket.stream.push(event)
            if event.terminal and event.choice in ticket.owed:
                ticket.owed.discard(event.choice)
                ticket.is_cut_off |= event.finish is FinishReason.ABORTED and not ticket.stream.is_aborted
                self._live -= 1
                self._note_end()
                if not ticket.owed:
                    del self._tickets[number]
                    self._cut_off += ticket.is_cut_off
                self._free_name(number, ticket.stream)

    def _finish(self, number: int, choice: int) -> None:
        ticket = self._tickets.get(number)
        if ticket is not None:
            self._send(Finish(number, choice))
            self._free_name(number, ticket.stream)

    def _free_name(self, number: int, stream: RequestStream) -> None:
        """An id may come again once its reader has heard, or said, every end; tickets keep the two apart."""
        name = (stream.submission.tenant, stream.submission.request_id)
        if not stream.is_open and self._names.get(name) == number:
            del self._names[name]

    def _send(self, command: Command) -> None:
        try:
            self._mailbox.put(command)
        except MailboxClosed:
            return  # `end` is on its way to everyone

    def _overloaded(self) -> Overloaded:
        limit = self._limits.max_live
        return Overloaded(self._estimate_retry(), metadata={"max_live_choices": str(limit)})

    def _note_end(self) -> None:
        now = self._clock()
        if self._last_end is not None:
            interval = now - self._last_end
            if self._finish_interval is None:
                self._finish_interval = interval
            self._finish_interval += _WEIGHT_OF_NEWEST * (interval - self._finish_interval)
        self._last_end = now if self._live else None  # an idle time says nothing about throughput

    def _estimate_retry(self) -> float:
        """Seconds until an eighth of the queue has moved on, so that those refused do not all come for one place."""
        if self._finish_interval is None:
            return _FIRST_RETRY
        wait = self._finish_interval * (1 + self._limits.max_queued // 8)
        return min(max(wait, _SHORTEST_RETRY), _LONGEST_RETRY)

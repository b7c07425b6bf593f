"""The loop: plan, execute, commit, publish. One thread, from `start` to `stop` or to its death.

Knows the order of things and what to do when the loop itself breaks; what to run is the
scheduler's matter, how to compute it the worker's, who listens the client's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from loramux_server.engine.execution import Worker, execute_contained
from loramux_server.engine.mailbox import Abort, Command, Finish, Mailbox, MailboxClosed, Stop, Submit
from loramux_server.engine.plan import StepPlan, StepResult
from loramux_server.engine.scheduler import Routed, Scheduler
from loramux_server.engine.stats import NoObserver, Observer, StepStats, StepTimes, WeightsUsed
from loramux_server.requests import RequestFailure

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """The client side, called on the engine thread."""

    def publish(self, events: Sequence[Routed]) -> None:
        """All events of one step, in order."""
        ...

    def end(self, failure: RequestFailure) -> None:
        """Nothing follows: whoever has no terminal event yet gets `failure`."""
        ...


class Engine:
    """Joins a scheduler, a worker, a mailbox and a listener into a thread.

    `on_death` is called on the engine thread, once, if the loop dies of `error`; a failing step is no death.
    While idle the thread sleeps in the mailbox, at most `heartbeat_seconds` at a time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        mailbox: Mailbox,
        listener: Listener,
        *,
        observer: Observer | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        heartbeat_seconds: float = 0.5,
    ) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._mailbox = mailbox
        self._listener = listener
        self._observer = observer if observer is not None else NoObserver()
        self._on_death = on_death
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._heartbeat = clock()
        self._stop_by: float | None = None
        self._did_run = False  # whether the last turn had something to compute
        self._is_checked = True  # whether the books were checked since the last step
        self._thread = threading.Thread(target=self._serve, name="loramux-engine", daemon=True)

    @property
    def heartbeat(self) -> float:
        """When the last turn of the loop began (monotonic): older than a step may take means that it hangs."""
        return self._heartbeat

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._heartbeat = self._clock()
        self._thread.start()

    def stop(self, grace: float, timeout: float | None = None) -> bool:
        """Let live requests end for `grace` seconds, abort the rest, end the thread. Blocks: call it off the loop.

        Returns whether the thread has ended; False only when `timeout` seconds passed, as with a step that hangs.
        """
        with contextlib.suppress(MailboxClosed):  # it has ended already
            self._mailbox.put(Stop(self._clock() + grace))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            while not self._may_stop():
                self._turn()
            self._scheduler.abort_all(self._clock())
            self._listener.publish(self._scheduler.take_events())
            self._end(RequestFailure("DRAINING", "the server has stopped"))
        except BaseException as error:  # whatever it is, those who wait must hear of it
            logger.critical("the engine died", exc_info=error)
            self._end(RequestFailure("ENGINE_DEAD", "the engine has died"))
            if self._on_death is not None:
                self._on_death(error)

    def _turn(self) -> None:
        for command in self._mailbox.take(self._poll_timeout()):
            self._handle(command)
        started = self._heartbeat = self._clock()
        plan = self._scheduler.plan(started)
        planned = ran = self._clock()
        result = None
        if plan.chunks or plan.has_commands or self._worker.is_busy:
            result = execute_contained(self._worker, plan)
            ran = self._clock()
        if plan.chunks and result is not None:
            self._scheduler.commit(plan, result, ran)
        committed = self._clock()
        events = self._scheduler.take_events()
        if events:
            self._listener.publish(events)
        if plan.chunks or events:
            self._report(plan, result, (started, planned, ran, committed, self._clock()))
        self._did_run = result is not None
        if self._did_run:
            self._is_checked = False
        elif self._scheduler.is_idle and not self._is_checked:
            self._scheduler.check()  # of what could give a request another's tokens; cheap, and nobody waits
            self._is_checked = True

    def _handle(self, command: Command) -> None:
        match command:
            case Submit(ticket, submission, arrived):
                self._scheduler.submit(ticket, submission, arrived)
            case Abort(ticket):
                self._scheduler.abort(ticket, self._clock())
            case Finish(ticket, choice):
                self._scheduler.finish(ticket, choice, self._clock())
            case Stop(by):
                self._stop_by = by if self._stop_by is None else min(by, self._stop_by)

    def _may_stop(self) -> bool:
        return self._stop_by is not None and (self._scheduler.is_idle or self._clock() >= self._stop_by)

    def _poll_timeout(self) -> float:
        """Seconds to wait for a command: none while steps follow each other, else until something is due."""
        if self._did_run:
            return 0.0
        due = self._scheduler.next_deadline
        if self._stop_by is not None:
            due = min(due, self._stop_by)
        return min(max(due - self._clock(), 0.0), self._heartbeat_seconds)

    def _report(self, plan: StepPlan, result: StepResult | None, at: tuple[float, float, float, float, float]) -> None:
        started, planned, ran, committed, published = at
        timing = None if result is None else result.timing
        decodes = sum(len(chunk.tokens) == 1 and chunk.samples for chunk in plan.chunks)
        self._observer.step(
            StepStats(
                step=plan.step,
                tokens=sum(len(chunk.tokens) for chunk in plan.chunks),
                prefill_chunks=len(plan.chunks) - decodes,
                decode_chunks=decodes,
                distinct_adapters=len({chunk.slot for chunk in plan.chunks if chunk.slot >= 0}),
                weights=_weights_of(plan),
                failures=0 if result is None else len(result.failures),
                load=self._scheduler.load(),
                counters=self._scheduler.take_counters(),
                times=StepTimes(
                    plan=planned - started,
                    run=ran - planned,
                    prepare=timing.prepare if timing else 0.0,
                    forward=timing.forward if timing else 0.0,
                    sample=timing.sample if timing else 0.0,
                    commit=committed - ran,
                    publish=published - committed,
                ),
            )
        )

    def _end(self, failure: RequestFailure) -> None:
        self._mailbox.close()
        try:
            self._listener.end(failure)
        except RuntimeError:
            # The event loop is closed: nobody is left to hear it.
            logger.warning("the engine ended after its listener")


def _weights_of(plan: StepPlan) -> WeightsUsed:
    if plan.merged is None:
        return "shared"
    return "merged" if all(chunk.is_merged for chunk in plan.chunks) else "mixed"

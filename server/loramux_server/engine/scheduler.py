"""Decides what runs next and what came of it: `plan` before a step, `commit` after it.

Decodes first, prefill chunks fill the token budget, then waiting requests are admitted in the
policy's order. Knows no thread, no clock and no device: times come in, events are taken out.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from loramux_adapters.errors import AdapterError
from loramux_server.engine.leases import Adapters, MergedAdapters, NothingMerged
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.plan import Sampled, StepPlan, StepResult
from loramux_server.engine.policies import AdapterAdmission, FirstComeFirstServed, insert_ordered, remove_ordered
from loramux_server.engine.request import Request, State, expand
from loramux_server.engine.stats import Ended, Load, StepCounters, WaitReason
from loramux_server.engine.step_builder import StepBuilder
from loramux_server.engine.tables import BlockTables
from loramux_server.errors import InvalidRequest, failure_of
from loramux_server.requests import FinishReason, RequestFailure, Submission, TokenEvent, TokenLogprob

Routed = tuple[int, TokenEvent]
"""An event and the ticket of the submission it belongs to."""


class Scheduler:
    """All live requests of one engine. One thread calls everything."""

    def __init__(self, limits: EngineLimits, adapters: Adapters, merged: MergedAdapters | None = None) -> None:
        self.limits = limits
        self.tables = BlockTables(limits)
        self._adapters = adapters
        self._policy = FirstComeFirstServed()
        self._merged = merged if merged is not None else NothingMerged()
        self._live: dict[str, Request] = {}
        self._tickets: dict[int, list[Request]] = {}
        self._running: list[Request] = []  # kept by `order`
        self._next_deadline = float("inf")  # no live request has an earlier one
        self._step = 0
        self._retired: list[str] = []
        self._events: list[Routed] = []
        self._counters = StepCounters()
        self._waiting_for: dict[WaitReason, int] = {}

    # What the client side asks for, between steps.

    def submit(self, ticket: int, submission: Submission, arrived: float) -> None:
        """Queue the choices of `submission`; they fail with TOO_LARGE at once if they could never fit."""
        long_rope = self.limits.uses_long_rope(submission)
        choices = list(expand(ticket, submission, arrived, long_rope=long_rope))
        self._tickets[ticket] = choices[:]
        for request in choices:
            self._live[request.key] = request
            self._policy.add(request)
        try:
            self.limits.check_fits(submission)
        except InvalidRequest as error:
            for request in choices:
                self._fail(request, RequestFailure("TOO_LARGE", str(error)), arrived, invalidate=False)
        if submission.deadline is not None:
            self._next_deadline = min(self._next_deadline, submission.deadline)

    def abort(self, ticket: int, now: float) -> None:
        """End what is left of `ticket` with ABORTED; nothing if it has ended."""
        for request in tuple(self._tickets.get(ticket, ())):
            self._finish(request, FinishReason.ABORTED, now)

    def finish(self, ticket: int, choice: int, now: float) -> None:
        """End one choice with STOP, as the client side decided; nothing if it has ended."""
        for request in tuple(self._tickets.get(ticket, ())):
            if request.choice == choice:
                self._finish(request, FinishReason.STOP, now)

    def abort_all(self, now: float) -> None:
        """End everything with ABORTED."""
        for request in tuple(self._live.values()):
            self._finish(request, FinishReason.ABORTED, now)

    # One step.

    def plan(self, now: float) -> StepPlan:
        """What the next step does; no chunks when nothing can run."""
        self._adapters.poll()
        for digest in self._adapters.take_gone():
            self.tables.pool.forget(digest)  # before any block that somebody may still look for
        self._expire(now)
        builder = StepBuilder(self.limits, self.tables)
        preempted = self._counters.preemptions
        self._add_decodes(builder)
        builder.add_prefills(self._running)
        self._waiting_for = {}
        if self._counters.preemptions == preempted:
            self._admit(builder, now)
        elif len(self._policy):
            # Blocks just taken from one request are not for the next in the queue.
            self._waiting_for["blocks"] = len(self._policy)
        return self._make_plan(builder)

    def _make_plan(self, builder: StepBuilder) -> StepPlan:
        unbind, bind = self._adapters.take_bindings()
        unmerge, merge = self._merged.take_merges()  # before `ready`: what is dropped here is not used any more
        merged = builder.choose_merged(self._merged.ready(), self._merged.on_trial())
        self._step += 1
        retired: tuple[str, ...] = ()
        if builder.chunks:
            retired, self._retired = tuple(self._retired), []
        return StepPlan(self._step, tuple(builder.chunks), merged, retired, unbind, bind, unmerge, merge)

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """Take in what the step gave. Each chunk's request goes on, ends, or fails alone."""
        if len(result.failures) == len(plan.chunks):
            # The step may have failed before the runner came to these.
            self._retired += plan.retired
        for chunk in plan.chunks:
            key = chunk.request_id
            request = self._live[key]
            failure = result.failures.get(key)
            sampled = result.sampled.get(key) if chunk.samples else None
            if failure is None and chunk.samples and sampled is None:
                failure = RequestFailure("INTERNAL", "the step gave no token for this request")
            if failure is not None:
                self._fail(request, failure, now)
                continue
            self.tables.record(request, chunk)
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs.get(key, ())
                if request.computed >= request.prompt_length:
                    self._tell_prompt_logprobs(request, request.prompt_logprobs)
            if sampled is not None:
                self._accept(request, sampled, now)
            elif request.remaining == 0:  # max_tokens 0: the prompt was all there was to compute
                self._finish(request, FinishReason.LENGTH, now)

    # What is to be told.

    @property
    def is_idle(self) -> bool:
        """Whether no request is live."""
        return not self._live

    @property
    def next_deadline(self) -> float:
        """No deadline passes before this time (monotonic); infinite without deadlines."""
        return self._next_deadline

    def check(self) -> None:
        """Raises ValueError when the books of blocks, slots and leases do not add up. To be called while idle."""
        pool = self.tables.pool
        pool.check()
        if pool.held:
            raise ValueError(f"{pool.held} KV blocks are held and no request is live")
        self._adapters.check()

    def take_events(self) -> list[Routed]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def take_counters(self) -> StepCounters:
        """What was counted since the last call."""
        counters, self._counters = self._counters, StepCounters()
        return counters

    def load(self) -> Load:
        """How full the engine is."""
        pool = self.tables.pool
        return Load(
            running=len(self._running),
            waiting=dict(self._waiting_for),
            running_adapters=frozenset(request.digest for request in self._running if request.digest),
            waiting_adapters=frozenset(request.digest for request in self._policy if request.digest),
            kv_blocks=pool.count,
            kv_blocks_held=pool.held,
        )

    # Planning.

    def _expire(self, now: float) -> None:
        if now < self._next_deadline:
            return
        failure = RequestFailure("DEADLINE", "the deadline passed before the request was complete")
        self._next_deadline = float("inf")
        for request in tuple(self._live.values()):
            deadline = request.submission.deadline
            if deadline is None:
                continue
            if now >= deadline:
                self._fail(request, failure, now, invalidate=False)
            else:
                self._next_deadline = min(self._next_deadline, deadline)

    def _add_decodes(self, builder: StepBuilder) -> None:
        # In order of service, so that whoever must give way has no chunk in this step yet.
        for request in tuple(self._running):
            if request.remaining == 1 and request.state is State.RUNNING and self._make_room(request):
                builder.add(request, request.computed + 1)

    def _make_room(self, request: Request) -> bool:
        while not self.tables.grow(request):
            victim = self._policy.find_victim(self._running)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the queue; it will recompute all it had, output included."""
        self._leave_step(request)
        request.state = State.WAITING
        request.entered = False
        request.preemptions += 1
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = []
        self._counters.preemptions += 1
        self._policy.add(request)

    def _admit(self, builder: StepBuilder, now: float) -> None:
        admission = AdapterAdmission(self.limits.max_skips, self.limits.max_loads_tried)
        waiting_for: dict[WaitReason, int] = {}
        stopped: WaitReason = "capacity"
        for request in self._policy:
            if len(self._running) >= self.limits.max_running or not builder.has_room(request):
                break
            if request.is_held:
                waiting_for["sibling"] = waiting_for.get("sibling", 0) + 1
                continue
            cached = self.tables.find_cached(request)
            # Those that run will want blocks soon: one each is left, or the newcomer would be sent back at once.
            if not self.tables.can_admit(request, cached, reserve=len(self._running)):
                stopped = "blocks"
                break
            if not self._lease(request, admission, now):
                if request.state is State.WAITING:
                    waiting_for["adapter"] = waiting_for.get("adapter", 0) + 1
                    if admission.is_over:
                        stopped = "adapter"
                        break
                continue
            self._policy.remove(request)
            insert_ordered(self._running, request)
            request.state = State.RUNNING
            self.tables.admit(request, cached)
            self._mark_admission(request, now)
            builder.add_prefill(request)
        self._prefetch()
        rest = len(self._policy) - sum(waiting_for.values())
        if rest:
            waiting_for[stopped] = waiting_for.get(stopped, 0) + rest
        self._waiting_for = waiting_for

    def _prefetch(self) -> None:
        """Of the requests that wait first: when their turn comes, only the copy to the device is left."""
        waiting = islice(self._policy, self.limits.max_loads_tried)
        self._adapters.prefetch(dict.fromkeys(request.digest for request in waiting if request.digest is not None))

    def _lease(self, request: Request, admission: AdapterAdmission, now: float) -> bool:
        """Whether `request` has what it needs of adapters. A failed load ends it, and it alone."""
        if request.digest is None:
            return True
        if admission.may_ask(request):
            try:
                places = self.limits.max_running - len(self._running)
                request.lease = self._adapters.try_acquire(request.digest, may_load=admission.may_load(places))
            except AdapterError as error:
                failure = failure_of(error)
                if failure.code == "INTERNAL":
                    failure = RequestFailure("ADAPTER_LOAD_FAILED", str(error))
                self._fail(request, failure, now, invalidate=False)
                return False
        if request.lease is None:
            admission.skip(request)
            return False
        admission.admit(request)
        return True

    def _mark_admission(self, request: Request, now: float) -> None:
        if request.admitted_at is not None:
            return
        request.admitted_at = now
        request.cached = min(request.computed, request.prompt_length)
        self._counters.queued.append(now - request.arrived)
        self._counters.prefix_queried += request.prompt_length
        self._counters.prefix_hit += request.cached

    # Outcomes.

    def _accept(self, request: Request, sampled: Sampled, now: float) -> None:
        request.validated = request.computed
        request.tokens.append(sampled.token)
        if request.last_token_at is None:
            self._counters.first_token.append(now - request.arrived)
        else:
            self._counters.inter_token.append(now - request.last_token_at)
        request.last_token_at = now
        reason, stop_token = request.find_end() or (None, None)
        self._events.append(
            (
                request.ticket,
                TokenEvent(
                    request.choice,
                    sampled.token,
                    sampled.logprob,
                    finish=reason,
                    stop_token=stop_token,
                    usage=request.usage,
                ),
            )
        )
        if reason is not None:
            self._end(request, reason.value, now)

    def _tell_prompt_logprobs(self, request: Request, logprobs: list[TokenLogprob | None]) -> None:
        event = TokenEvent(request.choice, prompt_logprobs=tuple(logprobs))
        self._emit(request, event)
        request.prompt_logprobs = None
        # Told once: when preempted now, it need not compute them again and may read cached blocks.
        request.params = replace(request.params, prompt_logprobs=None)

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
        event = TokenEvent(request.choice, finish=reason, usage=request.usage)
        self._emit(request, event)
        self._end(request, reason.value, now)

    def _fail(self, request: Request, failure: RequestFailure, now: float, *, invalidate: bool = True) -> None:
        """End `request` badly. `invalidate`: a step failed it, so its KV must not be found by others."""
        event = TokenEvent(request.choice, failure=failure, usage=request.usage)
        self._emit(request, event)
        self._end(request, failure.code, now, invalidate=invalidate)

    def _emit(self, request: Request, event: TokenEvent) -> None:
        self._events.append((request.ticket, event))

    def _end(self, request: Request, outcome: str, now: float, *, invalidate: bool = False) -> None:
        """Forget a live request whose terminal event is out: blocks and lease are free when this returns."""
        if request.state is State.RUNNING:
            self._leave_step(request, invalidate=invalidate)
        else:
            self._policy.remove(request)
        request.state = State.ENDED
        del self._live[request.key]
        siblings = self._tickets[request.ticket]
        siblings.remove(request)
        if not siblings:
            del self._tickets[request.ticket]
        if request.seen_by_runner:
            self._retired.append(request.key)
        usage = request.usage
        self._counters.ended.append(
            Ended(
                tenant=request.submission.tenant,
                digest=request.digest,
                outcome=outcome,
                seconds=now - request.arrived,
                prompt=usage.prompt,
                completion=usage.completion,
                cached=usage.cached,
                preemptions=request.preemptions,
            )
        )

    def _leave_step(self, request: Request, *, invalidate: bool = False) -> None:
        remove_ordered(self._running, request)
        self.tables.release(request, invalidate=invalidate)
        if request.lease is not None:
            request.lease.release()
            request.lease = None

"""Drives a scheduler and a fake runner step by step, on a clock of its own, without threads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from loramux_server.engine.execution import execute_contained
from loramux_server.engine.leases import NothingMerged
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.scheduler import Scheduler
from loramux_server.requests import SamplingParams, StopConditions, Submission, TokenEvent
from support.fake_pool import FakePool
from support.fake_runner import FakeRunner, solo

BASE: str | None = None


def digest(number: int) -> str:
    """A digest that reads well in a failure."""
    return f"{number:064x}"


def submission(request_id: str = "r", prompt: int | list[int] = 5, max_tokens: int = 4, **more: Any) -> Submission:
    """A greedy submission. `prompt` is its tokens or how many; `stop` and `sampling` take keyword mappings."""
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    stop = StopConditions(**more.pop("stop", {}))
    sampling = SamplingParams(**{"temperature": 0.0, **more.pop("sampling", {})})
    more.setdefault("tenant", "default")
    more.setdefault("digest", BASE)
    return Submission(
        request_id=request_id, prompt=tuple(tokens), sampling=sampling, stop=stop, max_tokens=max_tokens, **more
    )


def limits(**changes: Any) -> EngineLimits:
    """Small limits: 64 blocks of 4 tokens, 32 tokens a step, 8 running."""
    return EngineLimits(
        **{"kv_blocks": 64, "block_tokens": 4, "max_batch_tokens": 32, "max_running": 8, "prefill_chunk": 8, **changes}
    )


class Merged(NothingMerged):
    """Says what is ready, and has nothing to build."""

    def __init__(self, ready: Callable[[], frozenset[str]], on_trial: Callable[[], frozenset[str]]) -> None:
        self._ready, self._on_trial = ready, on_trial

    def ready(self) -> frozenset[str]:
        """What the test says."""
        return self._ready()

    def on_trial(self) -> frozenset[str]:
        """What the test says."""
        return self._on_trial()


class SchedulerHarness:
    """One scheduler, one fake runner, one fake pool; collects events and checks that ends are final."""

    def __init__(
        self,
        bounds: EngineLimits | None = None,
        pool: FakePool | None = None,
        *,
        ready: Callable[[], frozenset[str]] = frozenset,
        on_trial: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.limits = bounds or limits()
        self.pool = pool or FakePool(4, at_once=True)
        self.scheduler = Scheduler(self.limits, self.pool, Merged(ready, on_trial))
        self.runner = FakeRunner(self.limits.block_tokens, self.pool.digest_of)
        self.now = 0.0
        self.submitted: dict[int, Submission] = {}
        self.events: dict[tuple[int, int], list[TokenEvent]] = defaultdict(list)

    def submit(self, what: Submission) -> int:
        """Hand over a submission; returns its ticket."""
        ticket = len(self.submitted) + 1
        self.submitted[ticket] = what
        self.scheduler.submit(ticket, what, self.now)
        self._collect()
        return ticket

    def step(self) -> StepPlan:
        """One turn of the loop."""
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        if plan.chunks:
            self.scheduler.commit(plan, execute_contained(self.runner, plan), self.now)
        self._collect()
        return plan

    def run(self, most: int = 1000) -> list[StepPlan]:
        """Turns until nothing is live; every load ends before the next turn."""
        plans = []
        for _ in range(most):
            if self.scheduler.is_idle:
                return plans
            plans.append(self.step())
            self.pool.report_all()
        raise AssertionError(f"still not idle after {most} turns")

    def abort(self, ticket: int) -> None:
        """Abort between two steps."""
        self.scheduler.abort(ticket, self.now)
        self._collect()

    def finish(self, ticket: int, choice: int = 0) -> None:
        """End one choice with STOP between two steps."""
        self.scheduler.finish(ticket, choice, self.now)
        self._collect()

    def tokens(self, ticket: int, choice: int = 0) -> list[int]:
        """Output so far."""
        return [event.token for event in self.events[ticket, choice] if event.token is not None]

    def last(self, ticket: int, choice: int = 0) -> TokenEvent:
        """The newest event."""
        return self.events[ticket, choice][-1]

    def check_equal_to_solo(self, ticket: int) -> None:
        """All choices of `ticket` have ended as they would alone."""
        what = self.submitted[ticket]
        for choice in range(what.n):
            assert (self.tokens(ticket, choice), self.last(ticket, choice).finish) == solo(what, choice)

    def check_idle(self) -> None:
        """Nothing is live and nothing is held."""
        assert self.scheduler.is_idle
        pool = self.scheduler.tables.pool
        pool.check()
        assert (pool.held, self.pool.leased) == (0, 0)
        load = self.scheduler.load()
        assert (load.running, load.waiting_adapters) == (0, frozenset())
        ends = {key: sum(event.terminal for event in events) for key, events in self.events.items()}
        wanted = {(ticket, choice): 1 for ticket, what in self.submitted.items() for choice in range(what.n)}
        assert ends == wanted

    def _collect(self) -> None:
        for ticket, event in self.scheduler.take_events():
            heard = self.events[ticket, event.choice]
            assert not (heard and heard[-1].terminal), "an event after the end"
            heard.append(event)

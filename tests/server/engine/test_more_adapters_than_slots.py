"""Ten times as many active adapters as slots, counted in steps: no cliff, nobody starves, no load for nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from loramux.bench.stats import percentile
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.scheduler import Scheduler
from support.fake_runner import FakeRunner
from support.pool_harness import PoolHarness
from support.scheduler_harness import submission

SLOTS, CLIENTS, REQUESTS, OUTPUT = 16, 32, 320, 32
RANK = 8


@dataclass
class Served:
    """Waits from submission to the first token, in steps."""

    waits: list[float] = field(default_factory=list)
    steps: int = 0
    loads: int = 0


def serve(active: int, jobs_per_step: int) -> Served:
    """32 clients, 16 rows a step: each client asks for one of `active` adapters by chance, again and again."""
    harness, draw = PoolHarness(capacity=SLOTS * RANK, slots=SLOTS), random.Random(1)
    scheduler = Scheduler(EngineLimits(kv_blocks=4096, max_running=SLOTS), harness.pool)
    bound: dict[int, str] = {}
    runner = FakeRunner(16, bound.__getitem__)
    sent: dict[int, int] = {}
    served, live = Served(), 0

    def submit() -> None:
        ticket = len(sent) + 1
        sent[ticket] = served.steps
        name = f"{RANK}-{draw.randrange(active):03}"
        what = submission(f"r{ticket}", prompt=64, max_tokens=OUTPUT, digest=name, cache_salt=str(ticket))
        scheduler.submit(ticket, what, float(served.steps))

    for _ in range(CLIENTS):
        submit()
    live = CLIENTS
    while live:
        served.steps += 1
        plan = scheduler.plan(float(served.steps))
        for slot in plan.unbind:
            del bound[slot]
        bound.update((binding.slot, binding.digest) for binding in plan.bind)
        if plan.chunks:
            scheduler.commit(plan, execute_contained(runner, plan), float(served.steps))
        for ticket, event in scheduler.take_events():
            assert event.failure is None
            if event.usage is not None and event.usage.completion == 1:
                served.waits.append(served.steps - sent[ticket])
            if event.terminal:
                live -= 1
                if len(sent) < REQUESTS:
                    submit()
                    live += 1
        for _ in range(jobs_per_step):
            if harness.loader.work:
                harness.loader.work.pop(0)()
    scheduler.check()
    served.loads = harness.pool.stats().loads
    assert len(served.waits) == REQUESTS
    return served


@pytest.mark.parametrize("jobs_per_step", [2, 3])
def test_there_is_no_cliff_past_the_slots(jobs_per_step: int) -> None:
    fits = serve(SLOTS, jobs_per_step)
    for more in (2, 10):
        served = serve(more * SLOTS, jobs_per_step)
        assert served.steps < 1.15 * fits.steps
        assert percentile(served.waits, 0.5) < 1.5 * percentile(fits.waits, 0.5)
        assert percentile(served.waits, 0.95) < 2.5 * percentile(fits.waits, 0.95)
        # Skipped by sixteen others at the most, who take a turn of all rows: two turns more than in the fitting case.
        assert max(served.waits) < max(fits.waits) + 2 * OUTPUT


@pytest.mark.parametrize("jobs_per_step", [2, 3])
def test_what_is_loaded_is_used(jobs_per_step: int) -> None:
    # Every request with an adapter of its own would take one load each: more than that were loaded for nothing.
    assert serve(10 * SLOTS, jobs_per_step).loads <= REQUESTS

"""A whole engine on its thread with a fake runner and pool, and its client on the running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.mailbox import Mailbox
from loramux_server.engine.scheduler import Scheduler
from loramux_server.engine.stats import StepStats
from support.fake_pool import FakePool
from support.fake_runner import FakeRunner
from support.scheduler_harness import limits


@dataclass
class Watch:
    """An observer that keeps everything."""

    steps: list[StepStats] = field(default_factory=list)
    rejections: list[str] = field(default_factory=list)

    def step(self, stats: StepStats) -> None:
        """Keep it."""
        self.steps.append(stats)

    def rejected(self, reason: str) -> None:
        """Keep it."""
        self.rejections.append(reason)


@dataclass
class Running:
    """What a test may look at."""

    engine: Engine
    client: EngineClient
    scheduler: Scheduler
    mailbox: Mailbox
    runner: FakeRunner
    pool: FakePool
    watch: Watch
    deaths: list[BaseException]


@asynccontextmanager
async def running(bounds: EngineLimits | None = None, pool: FakePool | None = None) -> AsyncIterator[Running]:
    """Start an engine; stop it, at once, at the end."""
    bounds = bounds or limits()
    pool = pool or FakePool(4, at_once=True)
    mailbox = Mailbox(bounds.max_live)
    scheduler = Scheduler(bounds, pool)
    runner = FakeRunner(bounds.block_tokens, pool.digest_of)
    watch = Watch()
    client = EngineClient(mailbox, bounds, observer=watch)
    deaths: list[BaseException] = []
    engine = Engine(scheduler, runner, mailbox, client, observer=watch, on_death=deaths.append, heartbeat_seconds=0.05)
    engine.start()
    try:
        yield Running(engine, client, scheduler, mailbox, runner, pool, watch, deaths)
    finally:
        assert await asyncio.to_thread(engine.stop, 0.0, 30.0), "the engine thread hangs"

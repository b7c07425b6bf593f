"""The scheduler with the real AdapterPool over tiers of plain values: more adapters than slots, loads at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import pytest

from loramux_adapters.binding import RankRanges
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.residency.pool import AdapterPool
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.residency.tiers import CopyDone
from loramux_adapters.spec import AdapterSpec
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.scheduler import Scheduler
from support.fake_runner import FakeRunner, solo
from support.scheduler_harness import digest, limits, submission

SKIPS = 2


@dataclass(frozen=True)
class Weights:
    """An adapter of one rank on one module."""

    spec: AdapterSpec
    nbytes: int = 1


class Host:
    """Reads anything, but for one corrupt digest."""

    def load(self, wanted: str) -> Weights:
        if wanted == digest(13):
            raise AdapterCorrupt("the stored bytes do not match")
        rank = 8 * (1 + int(wanted, 16) % 3)
        return Weights(AdapterSpec(wanted, "lora", None, False, {"layer": rank}, frozenset(), 1))

    def size(self, wanted: str) -> int:
        return 0

    def discard(self, wanted: str) -> None:
        pass


class Device:
    """Remembers what is bound where, and that nothing is written where something is bound."""

    def __init__(self) -> None:
        self.bound: dict[int, str] = {}
        self.copied: dict[int, str] = {}

    def cost(self, weights: Weights) -> tuple[Mapping[str, int], int]:
        return weights.spec.ranks, 0

    def stage(self, slot: int, weights: Weights, rank_ranges: RankRanges, done: CopyDone) -> None:
        self.copied[slot] = weights.spec.digest
        done(None)

    def take_commands(self, plan: StepPlan) -> None:
        for slot in plan.unbind:
            del self.bound[slot]
        for binding in plan.bind:
            assert binding.slot not in self.bound
            assert self.copied[binding.slot] == binding.digest
            self.bound[binding.slot] = binding.digest


class Later(Executor):
    """A loader whose work is done when the test says so, in any order."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.work.append(lambda: fn(*args, **kwargs))
        return Future()

    def do(self, count: int, random_: random.Random) -> None:
        for _ in range(min(count, len(self.work))):
            self.work.pop(random_.randrange(len(self.work)))()


@pytest.mark.parametrize("seed", range(8))
def test_every_request_gets_its_turn_and_its_own_adapter(seed: int):
    random_ = random.Random(seed)
    device, loader = Device(), Later()
    pool = AdapterPool(SlotTable(["layer"], 32, 3, 0), device, Host(), loader, lambda: None)
    bounds = limits(max_skips=SKIPS, max_running=4, kv_blocks=24, max_loads_tried=4)
    scheduler = Scheduler(bounds, pool)
    runner = FakeRunner(bounds.block_tokens, device.bound.__getitem__)
    submitted = {}
    tokens: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    for turn in range(3000):
        if len(submitted) < 60 and random_.random() < 0.5:
            ticket = len(submitted) + 1
            popular = random_.random() < 0.6
            which = random_.choice([1, 2]) if popular else random_.randrange(14)
            submitted[ticket] = submission(
                f"r{ticket}",
                prompt=[ticket] * random_.randint(1, 9),
                max_tokens=random_.randint(1, 12),
                digest=digest(which) if which else None,
            )
            scheduler.submit(ticket, submitted[ticket], float(turn))
            tokens[ticket] = []
        plan = scheduler.plan(float(turn))
        device.take_commands(plan)
        if plan.chunks:
            scheduler.commit(plan, execute_contained(runner, plan), float(turn))
        for ticket, event in scheduler.take_events():
            assert ticket not in ends
            if event.token is not None:
                tokens[ticket].append(event.token)
            if event.terminal:
                ends[ticket] = event.failure.code if event.failure else "ended"
        assert all(request.skips <= SKIPS for request in scheduler._live.values())
        pool.check()
        loader.do(random_.choice([0, 0, 1, 3]), random_)
        if len(ends) == 60:
            break
    assert sorted(ends) == sorted(submitted)
    for ticket, what in submitted.items():
        if what.digest == digest(13):
            assert ends[ticket] == "ADAPTER_CORRUPT"
        else:
            assert (ends[ticket], tokens[ticket]) == ("ended", solo(what)[0])
    assert pool.stats().leases == 0
    assert scheduler.tables.pool.held == 0

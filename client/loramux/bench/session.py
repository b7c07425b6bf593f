"""The order of a measurement: every driver makes ready, then rounds in which scenarios and drivers alternate.

What drifts over minutes on a shared machine meets all of them alike; ratios are taken inside a round.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from typing import TypeVar

from loramux.bench.driver import Call, Driver, DriverFailed, Trace
from loramux.bench.stats import Sample, sample
from loramux.bench.workload import Scenario, Workload

T = TypeVar("T")
Announce = Callable[[str], None]


def round_order(things: Sequence[T], round_number: int) -> list[T]:
    """What alternates in a round, started at another one each round."""
    first = round_number % len(things)
    return [*things[first:], *things[:first]]


async def measure(workload: Workload, drivers: Sequence[Driver], vocabulary: int, announce: Announce) -> list[Sample]:
    """All samples of the measured rounds; warm-up rounds are run and forgotten. Closes the drivers in any case."""
    samples: list[Sample] = []
    async with AsyncExitStack() as stack:
        for driver in drivers:
            stack.push_async_callback(driver.close)
        for driver in drivers:
            announce(f"{driver.name}: loading")
            await driver.start()
        for number in range(workload.warmup + workload.rounds):
            warming = number < workload.warmup
            for scenario in round_order(workload.scenarios, number):
                for driver in drivers:
                    taken = await _run(workload, driver, scenario, number, vocabulary)
                    phase = "warm-up" if warming else f"round {number - workload.warmup + 1} of {workload.rounds}"
                    announce(f"{phase}: {driver.name} {scenario.name} {taken.rate:.1f} tokens/s")
                    if not warming:
                        samples.append(taken)
    return samples


async def send(driver: Driver, calls: Sequence[Call], output_tokens: int, salt: str, at_once: int) -> list[Trace]:
    """All calls, at most `at_once` of them on their way; the next goes out when one is answered."""
    if len(calls) <= at_once:
        return await driver.run(calls, output_tokens, salt)
    waiting, traces = deque(calls), list[Trace]()

    async def client() -> None:
        while waiting:
            traces.extend(await driver.run([waiting.popleft()], output_tokens, salt))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return traces


@asynccontextmanager
async def sent_beside(
    driver: Driver, calls: Sequence[Call], salt: str, *, output_tokens: int = 1, at_once: int = 1
) -> AsyncIterator[None]:
    """Within, the calls are sent in circles, `at_once` on their way; without calls, nothing."""
    is_over = False
    rest = cycle(calls)

    async def client() -> None:
        for call in rest:
            await driver.run([call], output_tokens, salt)
            if is_over:
                return

    running = asyncio.gather(*(client() for _ in range(at_once)))
    try:
        yield
    finally:
        is_over = True
        await running


async def _run(workload: Workload, driver: Driver, scenario: Scenario, number: int, vocabulary: int) -> Sample:
    # A salt of each run's own: no prompt is in the prefix cache from another scenario, where it is the same one.
    salt = f"{number}/{scenario.name}"
    at_once = workload.most_at_once
    if workload.settle:
        await send(driver, workload.calls_before(scenario, number, vocabulary), 1, salt, at_once)
    before = driver.readings()
    async with sent_beside(driver, workload.calls_beside(scenario, number, vocabulary), salt):
        calls = workload.calls(scenario, number, vocabulary)
        traces = await send(driver, calls, workload.output_tokens, salt, at_once)
        after = driver.readings()
    asked = sorted(call.output_tokens or workload.output_tokens for call in calls)
    for answered, wanted in zip(sorted(len(trace.arrivals) for trace in traces), asked, strict=True):
        if answered != wanted:
            raise DriverFailed(f"{driver.name}, {scenario.name}: {answered} tokens, not {wanted} as asked")
    counted = {name: value - before.get(name, 0) for name, value in after.items()}
    return sample(driver.name, scenario.name, number, traces, counted)

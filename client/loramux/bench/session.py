"""The order of a measurement: every driver makes ready, then rounds in which scenarios and drivers alternate.

What drifts over minutes on a shared machine meets all of them alike; ratios are taken inside a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from loramux.bench.driver import Call, Driver, DriverFailed
from loramux.bench.stats import Sample, sample
from loramux.bench.workload import Scenario, Workload

Announce = Callable[[str], None]


def round_order(scenarios: Sequence[Scenario], round_number: int) -> list[Scenario]:
    """The scenarios, started at another one each round."""
    first = round_number % len(scenarios)
    return [*scenarios[first:], *scenarios[:first]]


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


async def _run(workload: Workload, driver: Driver, scenario: Scenario, number: int, vocabulary: int) -> Sample:
    prompts = workload.prompts(number, vocabulary)
    calls = [Call(prompt, adapter) for prompt, adapter in zip(prompts, workload.assignment(scenario), strict=True)]
    # The same prompts in every scenario, and none of them cached from another one.
    traces = await driver.run(calls, workload.output_tokens, f"{number}/{scenario.name}")
    wrong = [len(trace.arrivals) for trace in traces if len(trace.arrivals) != workload.output_tokens]
    if wrong:
        raise DriverFailed(f"{driver.name}, {scenario.name}: {wrong[0]} tokens, not {workload.output_tokens} as asked")
    return sample(driver.name, scenario.name, number, traces)

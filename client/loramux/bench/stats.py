"""From traces to numbers: rates, percentiles, ratios inside a round, medians over rounds. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """One request: when it was sent and when each output token arrived, in seconds on one clock."""

    sent: float
    arrivals: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One scenario of one round by one driver."""

    driver: str
    scenario: str
    round_number: int
    output_tokens: int
    seconds: float  # from the first request sent to the last token
    first_token: tuple[float, ...]  # seconds, one per request
    inter_token: tuple[float, ...]  # seconds, all gaps of all requests

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Summary:
    """A scenario over all rounds. `ratio` is the median of rate / base rate of the same driver in the same round."""

    driver: str
    scenario: str
    rounds: int
    rate: float
    rate_low: float
    rate_high: float
    ratio: float
    first_token_p50: float
    first_token_p95: float
    inter_token_p50: float
    inter_token_p95: float


def sample(driver: str, scenario: str, round_number: int, traces: Sequence[Trace]) -> Sample:
    """Reduce the traces of one run. Raises ValueError when a request got no token."""
    if not traces or any(not trace.arrivals for trace in traces):
        raise ValueError(f"{driver}, {scenario}: a request got no token")
    return Sample(
        driver,
        scenario,
        round_number,
        output_tokens=sum(len(trace.arrivals) for trace in traces),
        seconds=max(trace.arrivals[-1] for trace in traces) - min(trace.sent for trace in traces),
        first_token=tuple(trace.arrivals[0] - trace.sent for trace in traces),
        inter_token=tuple(
            after - before
            for trace in traces
            for before, after in zip(trace.arrivals, trace.arrivals[1:], strict=False)
        ),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 < share <= 1) of all values do not pass (nearest rank)."""
    if not values or not 0 < share <= 1:
        raise ValueError("a percentile needs values and a share in (0, 1]")
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def summarize(samples: Sequence[Sample], scenarios: Sequence[str]) -> list[Summary]:
    """One summary per driver and scenario, drivers in order of appearance; ratios to the first scenario."""
    summaries = []
    for driver in dict.fromkeys(entry.driver for entry in samples):
        base_rates = _rates(samples, driver, scenarios[0])
        for scenario in scenarios:
            group = [entry for entry in samples if (entry.driver, entry.scenario) == (driver, scenario)]
            if group:
                summaries.append(_summary(group, base_rates))
    return summaries


def _rates(samples: Sequence[Sample], driver: str, scenario: str) -> dict[int, float]:
    return {s.round_number: s.rate for s in samples if s.driver == driver and s.scenario == scenario}


def _summary(group: Sequence[Sample], base_rates: dict[int, float]) -> Summary:
    rates = [entry.rate for entry in group]
    ratios = [entry.rate / base_rates[entry.round_number] for entry in group if entry.round_number in base_rates]
    first = [value for entry in group for value in entry.first_token]
    gaps = [value for entry in group for value in entry.inter_token]
    return Summary(
        driver=group[0].driver,
        scenario=group[0].scenario,
        rounds=len(group),
        rate=statistics.median(rates),
        rate_low=min(rates),
        rate_high=max(rates),
        ratio=statistics.median(ratios) if ratios else math.nan,
        first_token_p50=percentile(first, 0.5),
        first_token_p95=percentile(first, 0.95),
        inter_token_p50=percentile(gaps, 0.5) if gaps else math.nan,
        inter_token_p95=percentile(gaps, 0.95) if gaps else math.nan,
    )

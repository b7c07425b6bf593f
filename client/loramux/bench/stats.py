"""From traces to numbers: rates, percentiles, ratios inside a round, medians over rounds. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loramux.bench.driver import EVICTIONS, LOADS, PROCESSOR_SECONDS, Trace


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
    counted: Mapping[str, float] = field(default_factory=dict)  # the driver's readings, of this run

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def processor_rate(self) -> float:
        """Output tokens per second of processor time, which others on the machine disturb less; nan: unknown."""
        return self.output_tokens / self.counted.get(PROCESSOR_SECONDS, math.nan)

    @property
    def slow_first_token(self) -> float:
        """The 99th percentile, in seconds."""
        return percentile(self.first_token, 0.99)

    @property
    def slow_inter_token(self) -> float:
        """The 99th percentile, in seconds; nan without gaps."""
        return percentile(self.inter_token, 0.99) if self.inter_token else math.nan


@dataclass(frozen=True)
class Summary:
    """A scenario over all rounds.

    Ratios are medians over the rounds of what this scenario has over what the first has by the same driver in the same
    round: `ratio` of the rates, `processor_ratio` of the rates by processor time, the others of 99th percentiles.
    Times are in seconds over the requests of all rounds; `loads` and `evictions` are medians. nan: not known.
    """

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
    processor_ratio: float
    first_token_p99: float
    first_token_longest: float
    first_token_ratio: float
    inter_token_p99: float
    inter_token_ratio: float
    loads: float
    evictions: float


def sample(
    driver: str,
    scenario: str,
    round_number: int,
    traces: Sequence[Trace],
    counted: Mapping[str, float] | None = None,
) -> Sample:
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
        counted=counted or {},
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
        first = _of(samples, driver, scenarios[0])
        for scenario in scenarios:
            group = _of(samples, driver, scenario)
            if group:
                summaries.append(_summary(group, {entry.round_number: entry for entry in first}))
    return summaries


def _of(samples: Sequence[Sample], driver: str, scenario: str) -> list[Sample]:
    return [entry for entry in samples if (entry.driver, entry.scenario) == (driver, scenario)]


def _summary(group: Sequence[Sample], references: Mapping[int, Sample]) -> Summary:
    rates = [entry.rate for entry in group]
    first = [value for entry in group for value in entry.first_token]
    gaps = [value for entry in group for value in entry.inter_token]

    def ratio(value: Callable[[Sample], float]) -> float:
        pairs = [(entry, references[entry.round_number]) for entry in group if entry.round_number in references]
        return statistics.median(value(entry) / value(other) for entry, other in pairs) if pairs else math.nan

    return Summary(
        driver=group[0].driver,
        scenario=group[0].scenario,
        rounds=len(group),
        rate=statistics.median(rates),
        rate_low=min(rates),
        rate_high=max(rates),
        ratio=ratio(lambda entry: entry.rate),
        first_token_p50=percentile(first, 0.5),
        first_token_p95=percentile(first, 0.95),
        inter_token_p50=percentile(gaps, 0.5) if gaps else math.nan,
        inter_token_p95=percentile(gaps, 0.95) if gaps else math.nan,
        processor_ratio=ratio(lambda entry: entry.processor_rate),
        first_token_p99=percentile(first, 0.99),
        first_token_longest=max(first),
        first_token_ratio=ratio(lambda entry: entry.slow_first_token),
        inter_token_p99=percentile(gaps, 0.99) if gaps else math.nan,
        inter_token_ratio=ratio(lambda entry: entry.slow_inter_token),
        loads=statistics.median(entry.counted.get(LOADS, math.nan) for entry in group),
        evictions=statistics.median(entry.counted.get(EVICTIONS, math.nan) for entry in group),
    )

"""A client that pushes new versions while others generate: from the end of the transfer to the first token with it.

Each push is of new content under the same name. The end of the transfer is when the last byte has left the client.
Cases alternate inside a round, as scenarios do; what is between transfer and token is told by `stages`, in process.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux.bench.driver import Call, PushingDriver
from loramux.bench.session import sent_beside
from loramux.bench.stats import percentile

NAME = "policy"
STREAM_TOKENS = 64
FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class UploadPlan:
    """`pushes` in each case of each round, one every `seconds`; a case is a number of streams on the base beside."""

    pushes: int
    seconds: float
    streams: tuple[int, ...]
    rounds: int
    prompt_tokens: int = 16


@dataclass(frozen=True)
class UploadSample:
    """One case of one round by one driver; all in seconds, one for each push."""

    driver: str
    streams: int
    round_number: int
    transfer: tuple[float, ...]  # from the call to its last byte
    acknowledged: tuple[float, ...]  # after the last byte
    first_token: tuple[float, ...]  # after the last byte
    stages: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class UploadSummary:
    """A case over all rounds, in seconds.

    `ratio` is the median over rounds of the median first token over that of the case with the fewest streams.
    """

    driver: str
    streams: int
    rounds: int
    pushes: int
    transfer_p50: float
    acknowledged_p50: float
    acknowledged_p99: float
    first_token_p50: float
    first_token_p99: float
    ratio: float
    stages: Mapping[str, tuple[float, float]]  # p50, p99


def write_version(directory: Path, out: Path, number: int) -> Path:
    """A directory of the same adapter but for some numbers, so that all of it is new to a server."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / FILE)
    first = next(iter(tensors.values())).view(-1)
    first[:8] = torch.randn(8, generator=torch.Generator().manual_seed(number)) * first.std()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    shutil.copy(directory / "adapter_config.json", out)
    return out


async def measure_uploads(
    plan: UploadPlan,
    drivers: Sequence[PushingDriver],
    directory: Path,
    vocabulary: int,
    scratch: Path,
    announce: Callable[[str], None],
) -> list[UploadSample]:
    """All samples; a first round warms up and is forgotten. The drivers are started already."""
    samples = []
    for number in range(plan.rounds + 1):
        for streams in plan.streams if number % 2 else reversed(plan.streams):
            for driver in drivers:
                taken = await _run(plan, driver, directory, streams, number, vocabulary, scratch)
                median = statistics.median(taken.first_token) * 1e3
                announce(f"round {number}: {driver.name} beside {streams} streams {median:.1f} ms")
                if number:
                    samples.append(taken)
    return samples


async def _run(
    plan: UploadPlan,
    driver: PushingDriver,
    directory: Path,
    streams: int,
    number: int,
    vocabulary: int,
    scratch: Path,
) -> UploadSample:
    draw = random.Random(f"{number}/{streams}")

    def prompt(tokens: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(tokens))

    busy = [Call(prompt(plan.prompt_tokens), None) for _ in range(streams)]
    transfer, acknowledged, first, stages = list[float](), list[float](), list[float](), dict[str, list[float]]()
    loop = asyncio.get_running_loop()
    async with sent_beside(driver, busy, f"{number}/{streams}", output_tokens=STREAM_TOKENS, at_once=streams):
        for push in range(plan.pushes):
            at = loop.time()
            version = f"{number}-{streams}-{push}"
            path = await asyncio.to_thread(write_version, directory, scratch / driver.name, draw.randrange(1 << 30))
            pushed = await driver.push(path, NAME)
            (trace,) = await driver.run([Call(prompt(plan.prompt_tokens), pushed.adapter)], 1, version)
            transfer.append(pushed.sent - pushed.began)
            acknowledged.append(pushed.acknowledged - pushed.sent)
            first.append(trace.arrivals[0] - pushed.sent)
            for stage, seconds in driver.stages_of(pushed, trace).items():
                stages.setdefault(stage, []).append(seconds)
            await asyncio.sleep(max(0.0, plan.seconds - (loop.time() - at)))
    told = {stage: tuple(seconds) for stage, seconds in stages.items()}
    return UploadSample(driver.name, streams, number, tuple(transfer), tuple(acknowledged), tuple(first), told)


def summarize_uploads(samples: Sequence[UploadSample]) -> list[UploadSummary]:
    """One summary for each driver and case; ratios to the case of fewest streams."""
    cases = sorted({(s.driver, s.streams) for s in samples})
    groups = {case: [s for s in samples if (s.driver, s.streams) == case] for case in cases}
    least = {driver: groups[driver, min(n for d, n in cases if d == driver)] for driver, _ in cases}
    return [_summary(group, least[driver]) for (driver, _), group in groups.items()]


def _summary(group: Sequence[UploadSample], least: Sequence[UploadSample]) -> UploadSummary:
    medians = {s.round_number: statistics.median(s.first_token) for s in least}
    ratios = [statistics.median(s.first_token) / medians[s.round_number] for s in group]
    acknowledged = [value for s in group for value in s.acknowledged]
    first = [value for s in group for value in s.first_token]
    stages = {name: [value for s in group for value in s.stages[name]] for name in group[0].stages}
    return UploadSummary(
        driver=group[0].driver,
        streams=group[0].streams,
        rounds=len(group),
        pushes=len(first),
        transfer_p50=percentile([value for s in group for value in s.transfer], 0.5),
        acknowledged_p50=percentile(acknowledged, 0.5),
        acknowledged_p99=percentile(acknowledged, 0.99),
        first_token_p50=percentile(first, 0.5),
        first_token_p99=percentile(first, 0.99),
        ratio=statistics.median(ratios),
        stages={name: (percentile(values, 0.5), percentile(values, 0.99)) for name, values in stages.items()},
    )


def upload_lines(summaries: Sequence[UploadSummary]) -> list[str]:
    """Lines of Markdown: the table, and one of the stages where they are known. Milliseconds."""
    lines = [
        "| driver | streams beside | pushes | transfer p50 | acknowledged p50 / p99 | first token p50 / p99 | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for s in summaries:
        lines.append(
            f"| {s.driver} | {s.streams} | {s.pushes} | {s.transfer_p50 * 1e3:.1f} "
            f"| {s.acknowledged_p50 * 1e3:.1f} / {s.acknowledged_p99 * 1e3:.1f} "
            f"| {s.first_token_p50 * 1e3:.1f} / {s.first_token_p99 * 1e3:.1f} | {s.ratio:.2f} |"
        )
    staged = [s for s in summaries if s.stages]
    if staged:
        titles = [f"{s.driver}, {s.streams} streams, p50 / p99" for s in staged]
        lines += ["", f"| stage | {' | '.join(titles)} |", f"|---|{'---:|' * len(staged)}"]
        for name in staged[0].stages:
            cells = [f"{s.stages[name][0] * 1e3:.1f} / {s.stages[name][1] * 1e3:.1f}" for s in staged]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines

"""Results as one JSON document and one Markdown page: numbers, workload, machine, nothing interpreted."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.stats import Sample, Summary
from loramux.bench.workload import Workload
from loramux.machine import Machine

if TYPE_CHECKING:
    from loramux.bench.profile import StepProfile

FORMAT = "loramux-bench-1"


class ResultsUnwritable(Exception):
    """The directory of results cannot be made or written."""


def document(
    workload: Workload,
    machine: Machine,
    summaries: Sequence[Summary],
    samples: Sequence[Sample],
    settings: dict[str, Any],
    taken: datetime,
) -> dict[str, Any]:
    """Everything that was measured, as JSON values. Single gaps are left out: their percentiles are in the summary."""
    return {
        "format": FORMAT,
        "taken": taken.isoformat(timespec="seconds"),
        "workload": dataclasses.asdict(workload),
        "settings": settings,
        "machine": dataclasses.asdict(machine),
        "summary": [known(dataclasses.asdict(entry)) for entry in summaries],
        "rounds": [
            {
                "driver": s.driver,
                "scenario": s.scenario,
                "round": s.round_number,
                "output_tokens": s.output_tokens,
                "seconds": s.seconds,
                "rate": s.rate,
                "first_token_p99": s.slow_first_token,
                **s.counted,
            }
            for s in samples
        ],
    }


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan: what is not known is null."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _range(workload: Workload) -> str:
    length, spread = workload.output_tokens, workload.output_spread
    return f"{length - spread} to {length + spread}" if spread else str(length)


def markdown(
    workload: Workload, machine: Machine, summaries: Sequence[Summary], settings: dict[str, Any], taken: datetime
) -> str:
    """The page for people."""
    lines = [
        f"# {workload.name}, {taken:%Y-%m-%d %H:%M} UTC",
        "",
        f"{workload.requests} requests, {workload.most_at_once} at once, {workload.prompt_tokens} tokens in, "
        f"{_range(workload)} out, greedy, distinct prompts; shape {workload.shape}, NF4; adapters of rank "
        f"{workload.adapters.rank} unless said otherwise, alpha {workload.adapters.alpha:g}, on all linears"
        f"{f'; {workload.slots} of them fit on the device' if workload.slots else ''}. "
        f"Medians of {workload.rounds} rounds in which drivers and scenarios alternate; a ratio is to the same "
        f"driver's `{workload.scenarios[0].name}` in the same round.",
        "",
        *table(summaries),
        "",
        "The slowest, and what was loaded for them (median of a round):",
        "",
        *tails(summaries),
        "",
        "Times are milliseconds, at the client. A ratio from one interleaved run is a result; "
        "an absolute time on a shared machine is not.",
        "",
        *machine_lines(machine, settings),
    ]
    return "\n".join(lines) + "\n"


def machine_lines(machine: Machine, settings: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: where and with which settings it was measured."""
    lines = [
        "## Machine of the bench",
        "",
        f"- {machine.cpu}, {machine.usable_cores} of {machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GiB, "
        f"flags {', '.join(machine.flags) or 'none of note'}",
        f"- load average at the end {', '.join(f'{value:.2f}' for value in machine.load_average)}",
        f"- {machine.system}, Python {machine.python}",
        f"- {', '.join(f'{name} {version}' for name, version in machine.versions.items())}",
        f"- settings: {', '.join(f'{name} {value}' for name, value in settings.items())}",
    ]
    if "kernels" not in machine.versions:
        lines.append(
            "- bitsandbytes, and so PEFT, without its optional hub kernel (the package `kernels` is not installed)"
        )
    if machine.accelerators:
        lines.append(f"- {', '.join(machine.accelerators)}")
    return lines


def table(summaries: Sequence[Summary]) -> list[str]:
    """Lines of a Markdown table."""
    titles = ("driver", "scenario", "output tokens/s", "low - high", "ratio", "first token p50 / p95")
    lines = [f"| {' | '.join((*titles, 'between tokens p50 / p95'))} |", "|---|---|---:|---:|---:|---:|---:|"]
    for s in summaries:
        lines.append(
            f"| {s.driver} | {s.scenario} | {s.rate:.1f} | {s.rate_low:.1f} - {s.rate_high:.1f} | {s.ratio:.2f} "
            f"| {s.first_token_p50 * 1e3:.1f} / {s.first_token_p95 * 1e3:.1f} "
            f"| {s.inter_token_p50 * 1e3:.1f} / {s.inter_token_p95 * 1e3:.1f} |"
        )
    return lines


def tails(summaries: Sequence[Summary]) -> list[str]:
    """Lines of a Markdown table: the slowest tokens, processor time, loads."""
    titles = (
        "driver", "scenario", "first token p99", "ratio", "longest", "between tokens p99", "ratio",
        "tokens per processor second, ratio", "loads", "evictions",
    )  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|---|---|{'---:|' * (len(titles) - 2)}"]
    for s in summaries:
        cells = (
            s.driver, s.scenario, _milliseconds(s.first_token_p99), _number(s.first_token_ratio, ".2f"),
            _milliseconds(s.first_token_longest), _milliseconds(s.inter_token_p99), _number(s.inter_token_ratio, ".2f"),
            _number(s.processor_ratio, ".2f"), _number(s.loads, ".0f"), _number(s.evictions, ".0f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _milliseconds(seconds: float) -> str:
    return _number(seconds * 1e3, ".1f")


def _number(value: float, form: str) -> str:
    """What this driver cannot know stays empty."""
    return "" if math.isnan(value) else format(value, form)


def prepare(directory: Path) -> None:
    """Make the directory and try to write there, before minutes are spent. Raises ResultsUnwritable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ResultsUnwritable(f"cannot write into {directory}: {error.strerror}") from error


def write(directory: Path, name: str, values: dict[str, Any], page: str) -> tuple[Path, Path]:
    """Write NAME.json and NAME.md; the paths. Raises ResultsUnwritable."""
    json_path, page_path = directory / f"{name}.json", directory / f"{name}.md"
    try:
        json_path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        page_path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ResultsUnwritable(f"cannot write {error.filename or directory}: {error.strerror}") from error
    return json_path, page_path


def profile_lines(profile: StepProfile) -> list[str]:
    """The profile of a decode step as Markdown."""
    names = list(next(iter(profile.parts.values())))
    lines = [
        f"## One decode step of {profile.rows} rows",
        "",
        "Medians in milliseconds, by the engine's own clock, no profiler running.",
        "",
        f"| scenario | steps | {' | '.join(names)} | together |",
        f"|---|---:|{'---:|' * (len(names) + 1)}",
    ]
    for scenario, parts in profile.parts.items():
        cells = " | ".join(f"{parts[name]:.2f}" for name in names)
        lines.append(f"| {scenario} | {profile.steps[scenario]} | {cells} | {sum(parts.values()):.2f} |")
    total = sum(profile.groups.values()) or 1.0
    lines += [
        "",
        f"Operations of a {profile.scenario} step under torch's profiler (self time per step; the profiler slows it: "
        f"the whole step is {sum(profile.profiled.values()):.2f} ms here, forward {profile.profiled['forward']:.2f}). "
        "Shares are of the whole step.",
        "",
        "| group | ms | share |",
        "|---|---:|---:|",
        *(f"| {group} | {ms:.2f} | {ms / total:.0%} |" for group, ms in profile.groups.items()),
        "",
        "| operation | input shapes | calls | ms |",
        "|---|---|---:|---:|",
        *(f"| {o.operation} | {o.shapes} | {o.calls:.0f} | {o.milliseconds:.2f} |" for o in profile.operations),
    ]
    return lines

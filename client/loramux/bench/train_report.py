"""Results of training as one JSON document and one Markdown page: numbers, workload, machine, nothing interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from loramux.bench.report import machine_lines
from loramux.bench.train_bench import CellSummary, CountResult, Ratio, StepSample, System, compared
from loramux.bench.train_workload import CountWorkload, SpeedWorkload
from loramux.machine import Machine

FORMAT = "loramux-train-bench-1"


def speed_document(
    workload: SpeedWorkload,
    machine: Machine,
    summaries: Sequence[CellSummary],
    samples: Sequence[StepSample],
    taken: datetime,
) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    cells = [
        {
            **dataclasses.asdict(entry.cell),
            "rates": dict(entry.rates),
            "ratios": [
                {"system": one, "over": other, **dataclasses.asdict(ratio)}
                for (one, other), ratio in entry.ratios.items()
            ],
        }
        for entry in summaries
    ]
    rounds = [
        {
            "system": entry.system.name,
            **dataclasses.asdict(entry.cell),
            "round": entry.round_number,
            "wall_seconds": entry.wall_seconds,
            "processor_seconds": entry.processor_seconds,
            "rate": entry.rate,
        }
        for entry in samples
    ]
    return {**_head(workload, machine, taken), "summary": cells, "rounds": rounds}


def count_document(
    workload: CountWorkload, machine: Machine, results: Sequence[CountResult], taken: datetime
) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    return {**_head(workload, machine, taken), "fleets": [dataclasses.asdict(result) for result in results]}


def speed_page(
    workload: SpeedWorkload,
    machine: Machine,
    summaries: Sequence[CellSummary],
    systems: Sequence[System],
    taken: datetime,
) -> str:
    """The page for people."""
    lines = [
        *_title(workload, taken),
        f"Shape {workload.shape}, NF4; each member a LoRA of rank {workload.rank} on all linears, AdamW, "
        f"rows a step: {workload.rows}, every token supervised. One step of each member: all in one fleet (micro-"
        f"batches of at most {workload.token_budget} tokens), or one after another. Rounds, in which systems "
        f"alternate: {workload.rounds}, of which medians; seconds are the processor's on one thread, else "
        "the wall's.",
        "",
        "Tokens/s:",
        "",
        *_table([system.name for system in systems], [(entry, _rates(entry, systems)) for entry in summaries]),
        "",
        "Ratios in the same round, median (lowest - highest):",
        "",
        *_table(
            [f"{one.name} / {other.name}" for one, other in compared(systems)],
            [(entry, [_ratio(ratio) for ratio in entry.ratios.values()]) for entry in summaries],
        ),
        "",
        *machine_lines(machine, _settings(workload)),
    ]
    return "\n".join(lines) + "\n"


def count_page(workload: CountWorkload, machine: Machine, results: Sequence[CountResult], taken: datetime) -> str:
    """The page for people."""
    lines = [
        *_title(workload, taken),
        f"Shape {workload.shape}, NF4; each member a LoRA of rank {workload.rank} on all linears, AdamW, "
        f"rows of {workload.tokens} tokens a step: {workload.rows}. The fleet takes in {workload.admitted} members "
        f"before each step until all are there, and then takes steps until there are {workload.steps} of all. Each "
        "fleet is in a process of its own.",
        "",
        "| members | steps | members in each | last step, s | tokens/s | peak memory, MiB | over one member |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    first = results[0].peak_bytes
    for result in results:
        seconds = result.steps[-1]["wall_seconds"]
        there = ", ".join(f"{step['stepped']:.0f}" for step in result.steps)
        peak, over = "", ""
        if result.peak_bytes is not None and first is not None:
            peak, over = f"{result.peak_bytes / 2**20:.0f}", f"{result.peak_bytes / first:.2f}"
        rate = result.members * workload.rows * workload.tokens / seconds
        lines.append(
            f"| {result.members} | {len(result.steps)} | {there} | {seconds:.2f} | {rate:.0f} | {peak} | {over} |"
        )
    return "\n".join([*lines, "", *machine_lines(machine, _settings(workload))]) + "\n"


def _head(workload: SpeedWorkload | CountWorkload, machine: Machine, taken: datetime) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "taken": taken.isoformat(timespec="seconds"),
        "workload": dataclasses.asdict(workload),
        "machine": dataclasses.asdict(machine),
    }


def _title(workload: SpeedWorkload | CountWorkload, taken: datetime) -> list[str]:
    return [f"# {workload.name}, {taken:%Y-%m-%d %H:%M} UTC", ""]


def _settings(workload: SpeedWorkload | CountWorkload) -> Mapping[str, Any]:
    threads = workload.threads if isinstance(workload, CountWorkload) else ", ".join(map(str, workload.threads))
    return {"threads": threads, "token budget": workload.token_budget}


def _table(titles: Sequence[str], rows: Sequence[tuple[CellSummary, Sequence[str]]]) -> list[str]:
    lines = [
        f"| threads | tokens a row | members | {' | '.join(titles)} |",
        f"|---:|---:|---:|{'---:|' * len(titles)}",
    ]
    for entry, cells in rows:
        cell = entry.cell
        lines.append(f"| {cell.threads} | {cell.tokens} | {cell.members} | {' | '.join(cells)} |")
    return lines


def _rates(entry: CellSummary, systems: Sequence[System]) -> list[str]:
    return [f"{entry.rates[system.name]:.0f}" for system in systems]


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"

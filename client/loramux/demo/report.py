"""The demo's outcome for people: one table, one line on speed, one verdict."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from loramux.demo.values import BAR, BurstOutcome, DemoOutcome, TaskOutcome

_LONGEST_CELL = 32


def task_table(tasks: tuple[TaskOutcome, ...]) -> Table:
    """One row per adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("ADAPTER", "EXAMPLE", "THE BASE SAYS", "THE ADAPTER SAYS"):
        table.add_column(title, overflow="fold", min_width=9)
    for title in ("BASE", "ADAPTER", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for task in tasks:
        verdict = Text("ok", style="green") if task.passed else Text("below the bar", style="bold red")
        cells = (task.name, task.example, task.base_says, task.adapter_says)
        shares = (percent(task.accuracy.base), percent(task.accuracy.adapter))
        table.add_row(*(Text(shorten(cell)) for cell in cells), *(Text(share) for share in shares), verdict)
    return table


def burst_lines(burst: BurstOutcome) -> list[str]:
    """What the mixed burst cost."""
    on = f"{burst.adapters} adapters, neighbors on different ones" if burst.adapters > 1 else "one adapter"
    return [
        f"mixed burst: {burst.requests} requests at once on {on}",
        f"  {burst.mixed_rate:,.0f} output tokens/s; the same prompts on the base only {burst.base_rate:,.0f}: "
        f"ratio {burst.ratio:.2f} (medians of {burst.rounds} alternating rounds)",
    ]


def verdict_lines(outcome: DemoOutcome) -> list[str]:
    """Whether the demo showed what it promises."""
    questions = min(task.accuracy.questions for task in outcome.tasks)
    failed = [task.name for task in outcome.tasks if not task.passed]
    bar = f"{BAR * 100:.0f} points above the base on {questions} held-out questions or more, asked through the server"
    verdict = f"failed: {', '.join(failed)} not {bar}" if failed else f"passed: every adapter at least {bar}"
    return [verdict, f"training {outcome.train_seconds:.0f} s, everything {outcome.total_seconds:.0f} s"]


def show(outcome: DemoOutcome, console: Console) -> None:
    """Print all of it."""
    parts: list[RenderableType] = ["", task_table(outcome.tasks), "", *burst_lines(outcome.burst), ""]
    parts += verdict_lines(outcome)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)


def percent(share: float) -> str:
    """A share as `97.5 %`."""
    return f"{share * 100:.1f} %"


def shorten(text: str) -> str:
    """One line of at most 32 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CELL else line[: _LONGEST_CELL - 1] + "…"

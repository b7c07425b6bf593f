"""`loramux demo`: train adapters, serve them in one mixed batch, and show what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import plain
from loramux.terminal.signals import terminated_as_interrupted

if TYPE_CHECKING:
    from loramux.demo.values import DemoOutcome


def command(
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions per task.")] = 200,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running and say what to try.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the outcome to this file.")] = None,
) -> None:
    """Train several LoRA adapters on the embedded base, serve them together and measure them through the server.

    Takes a few minutes on two cores and needs no download. Exits with 1 when an adapter is not at least 60 points
    above the base.
    """
    from rich.console import Console

    from loramux.demo.main import DemoOptions, run
    from loramux.demo.report import show

    console = Console() if sys.stdout.isatty() else Console(width=120)
    with terminated_as_interrupted():
        outcome, kept = run(DemoOptions(tasks=tuple(task or ()), questions=questions, keep=keep), console)
    show(outcome, console)
    if kept is not None:  # before anything that can fail: without these words the server is lost
        first = outcome.tasks[0]
        print(
            f"\nthe server runs on at {kept.address}; try\n"
            f"  loramux generate --address {kept.address} --adapter {first.name} --chat -t 0 '{first.example}'\n"
            f"  loramux adapters ls --address {kept.address}\n"
            f"end it with `kill {kept.pid}`, then remove {kept.directory}"
        )
    if json_file is not None:
        _write(json_file, _values(outcome))
    if not outcome.passed:
        raise typer.Exit(ExitCode.NO)


def _values(outcome: DemoOutcome) -> dict[str, object]:
    values = plain(outcome)
    return {**values, "burst": {**values["burst"], "ratio": outcome.burst.ratio}, "passed": outcome.passed}


def _write(file: Path, values: object) -> None:
    try:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from error

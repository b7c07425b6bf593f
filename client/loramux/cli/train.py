"""`loramux train`: adapters from a job file, with a progress bar or a live table."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.terminal.output import print_json, say, step_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loramux_trainer.job import TrainConfig
    from loramux_trainer.job_file import JobFile
    from loramux_trainer.run import TrainResult


def command(
    job_file: Annotated[Path, typer.Argument(help="YAML job; relative paths in it are relative to the file.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only check the job, its base, targets and records, and that its output can be written.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
) -> None:
    """Train adapters on the frozen NF4 base: one, or the jobs or the sweep of a file, all in one pass over it.

    An output is a directory that `adapters push` takes. The first SIGTERM, SIGHUP or Ctrl-C saves checkpoints and
    stops; `--resume` goes on from them.
    """
    from loramux_trainer.job_file import read_job_file
    from loramux_trainer.preflight import check_job

    file = read_job_file(job_file)
    if check:
        _check(job_file, file.jobs, resume=resume)
        return
    for job in file.jobs:
        check_job(job, resume=resume)  # what can be known before torch is imported
    if len(file.jobs) == 1 and file.sweep is None:
        _train_one(file.jobs[0], resume=resume, as_json=as_json)
    else:
        _train_several(file, resume=resume, as_json=as_json)


def _train_one(job: TrainConfig, *, resume: bool, as_json: bool) -> None:
    from loramux.terminal.training_bar import COLUMN, TrainingBar
    from loramux_trainer.interrupt import stop_on_signals
    from loramux_trainer.run import train

    with stop_on_signals(_say_stopping) as stop, step_progress(COLUMN) as bar:
        result = train(job, resume=resume, progress=TrainingBar(bar, job.output.name), stop=stop)
    if as_json:
        print_json(result)
        return
    print(_described(result))
    print(f"publish it with: loramux adapters push {result.output}")


def _train_several(file: JobFile, *, resume: bool, as_json: bool) -> None:
    from rich.console import Console

    from loramux.terminal.training_table import TrainingTable
    from loramux_trainer.interrupt import stop_on_signals
    from loramux_trainer.run import train_file

    names = [job.run_name for job in file.jobs]
    with stop_on_signals(_say_stopping) as stop, TrainingTable(Console(stderr=True), names) as table:
        outcome = train_file(file, resume=resume, progress=table, stop=stop)
    if as_json:
        print_json(outcome)
    else:
        for result in outcome.results.values():
            print(_described(result))
        for name, why in outcome.stopped.items():
            print(f"{name}: stopped at {why}")
        published = next(iter(outcome.results.values()), None)
        if outcome.best is not None:
            print(f"best: {outcome.best.describe()}")
            published = outcome.results[outcome.best.run]
        if published is not None:
            print(f"publish {'it' if outcome.best else 'one'} with: loramux adapters push {published.output}")
    for name, why in outcome.failures.items():
        say(f"{name} has no adapter: {why}")
    if outcome.failures:
        raise typer.Exit(1)


def _described(result: TrainResult) -> str:
    held_out = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4f}"
    return f"{result.output}: {result.steps} steps in {result.seconds:.1f} s, loss {result.loss:.4f}{held_out}"


def _check(job_file: Path, jobs: Sequence[TrainConfig], *, resume: bool) -> None:
    from loramux_trainer.dry_run import check_whole_job

    complete = [check_whole_job(job, resume=resume) for job in jobs]
    what = "a valid job" if len(jobs) == 1 else f"{len(jobs)} valid jobs"
    if all(complete):
        print(f"ok: {job_file} is {what}")
    else:
        print(f"ok: {job_file} is {what}, as far as one can tell without its base")
        say(f"{jobs[0].model} is not on this machine yet: the run checks lora.target_modules and the tokens")


def _say_stopping() -> None:
    with contextlib.suppress(OSError):
        # Not by print: the signal may have come in the middle of one, and a stream's buffer cannot be entered twice.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

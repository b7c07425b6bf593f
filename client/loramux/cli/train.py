"""`loramux train`: adapters from a job file, with a progress bar or a live table."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli import train_plan, train_table
from loramux.cli.arguments import DEFAULT_ADDRESS, Address
from loramux.cli.train_publish import prepare
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import print_json, say, step_progress
from loramux.terminal.signals import terminated_as_interrupted

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
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only measure a few steps on the first layers: what memory and time the run takes."
        ),
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Only compare, on this machine and base: LoRA on 16 bits, QLoRA, all layers, SGD, ranks 8 to 256.",
        ),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=2, help=f"Of each row of --table ({train_table.STEPS} by default).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    publish: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the adapter, or the best of a sweep, under this name.")
    ] = None,
    if_better_than: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Publish only what is better on data.eval than: current (what NAME serves, or the base where it is "
            "new), base, an adapter of the server, or a number.",
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="Of --if-better-than: loss, or exact (exact matches).")] = "loss",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Train adapters on the frozen NF4 base: one, or the jobs or the sweep of a file, all in one pass over it.

    An output is a directory that `adapters push` takes. The first SIGTERM, SIGHUP or Ctrl-C saves checkpoints and
    stops; `--resume` goes on from them.
    """
    from loramux_trainer.job_file import read_job_file
    from loramux_trainer.preflight import check_job

    instead = [flag for flag, given in (("--check", check), ("--plan", plan), ("--table", table)) if given]
    _refuse_what_has_no_effect(instead, steps, publish, if_better_than)
    file = read_job_file(job_file)
    if check:
        _check(job_file, file.jobs, resume=resume)
        return
    if plan or table:
        with terminated_as_interrupted():
            if plan:
                train_plan.plan(job_file, file, as_json=as_json)
            else:
                train_table.table(job_file, steps or train_table.STEPS, as_json=as_json)
        return
    for job in file.jobs:
        check_job(job, resume=resume)  # what can be known before torch is imported
    publishing = None if publish is None else prepare(file, publish, if_better_than, metric, address)
    begun = time.monotonic()
    output = _train(file, resume=resume, as_json=as_json, says_how_to_publish=publishing is None)
    train_plan.compare(job_file, file, time.monotonic() - begun)
    if publishing is not None and not publishing.publish(output):
        raise typer.Exit(ExitCode.NO)


def _refuse_what_has_no_effect(
    instead: Sequence[str], steps: int | None, publish: str | None, if_better_than: str | None
) -> None:
    """`instead`: which of --check, --plan and --table were given."""
    if len(instead) > 1:
        raise CommandError(f"{' and '.join(instead)} are several commands", remedy="give one at a time")
    if steps is not None and "--table" not in instead:
        raise CommandError("--steps is of --table", remedy="the job's own are training.max_steps")
    if if_better_than is not None and publish is None:
        raise CommandError("--if-better-than says when to publish", remedy="give a name with --publish too")
    if instead and publish is not None:
        raise CommandError(f"{instead[0]} trains no adapter that --publish could push", remedy="leave one of them out")


def _train(file: JobFile, *, resume: bool, as_json: bool, says_how_to_publish: bool) -> Path:
    """Returns the directory of the adapter, of the best one, or of the first."""
    if len(file.jobs) == 1 and file.sweep is None:
        return _train_one(file.jobs[0], resume=resume, as_json=as_json, says_how_to_publish=says_how_to_publish)
    return _train_several(file, resume=resume, as_json=as_json, says_how_to_publish=says_how_to_publish)


def _train_one(job: TrainConfig, *, resume: bool, as_json: bool, says_how_to_publish: bool) -> Path:
    """Returns the adapter's directory."""
    from loramux.terminal.training_bar import COLUMN, TrainingBar
    from loramux_trainer.interrupt import stop_on_signals
    from loramux_trainer.run import train

    with stop_on_signals(_say_stopping) as stop, step_progress(COLUMN) as bar:
        result = train(job, resume=resume, progress=TrainingBar(bar, job.output.name), stop=stop)
    if as_json:
        print_json(result)
        return result.output
    print(_described(result))
    if job.loss.name == "reward":
        print("it scores texts and generates none: load it with PEFT, no server takes it")
    elif says_how_to_publish:
        print(f"publish it with: loramux adapters push {result.output}")
    return result.output


def _train_several(file: JobFile, *, resume: bool, as_json: bool, says_how_to_publish: bool) -> Path:
    """Returns the directory of the best adapter, or of the first one."""
    from rich.console import Console

    from loramux.terminal.training_table import TrainingTable
    from loramux_trainer.interrupt import stop_on_signals
    from loramux_trainer.run import train_file

    names = [job.run_name for job in file.jobs]
    comparable = file.sweep is not None and file.incomparable_by is None
    watched = TrainingTable(Console(stderr=True), names, marks_best=comparable)
    with stop_on_signals(_say_stopping) as stop, watched as table:
        outcome = train_file(file, resume=resume, progress=table, stop=stop)
    chosen = next(iter(outcome.results.values()), None)
    if outcome.best is not None:
        chosen = outcome.results[outcome.best.run]
    if as_json:
        print_json(outcome)
    else:
        for result in outcome.results.values():
            print(_described(result))
        for name, why in outcome.stopped.items():
            print(f"{name}: stopped at {why}")
        if outcome.best is not None:
            print(f"best: {outcome.best.describe()}")
        if chosen is not None and says_how_to_publish:
            print(f"publish {'it' if outcome.best else 'one'} with: loramux adapters push {chosen.output}")
    for name, why in outcome.failures.items():
        say(f"{name} has no adapter: {why}")
    if outcome.failures or chosen is None:
        raise typer.Exit(1)
    if outcome.best is None and not says_how_to_publish:
        raise CommandError("the sweep has no best to publish: its jobs have no eval loss that could be compared")
    return chosen.output


def _described(result: TrainResult) -> str:
    held_out = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4f}"
    return f"{result.output}: {result.steps} steps in {result.seconds:.1f} s, loss {result.loss:.4f}{held_out}"


def _check(job_file: Path, jobs: Sequence[TrainConfig], *, resume: bool) -> None:
    from loramux_trainer.dry_run import check_whole_job

    found = [check_whole_job(job, resume=resume) for job in jobs]
    what = "a valid job" if len(jobs) == 1 else f"{len(jobs)} valid jobs"
    for job, warnings in zip(jobs, found, strict=True):
        for warning in warnings or ():
            say(f"warning: {warning}" if len(jobs) == 1 else f"warning: {job.run_name}: {warning}")
    if None not in found:
        print(f"ok: {job_file} is {what}")
    else:
        print(f"ok: {job_file} is {what}, as far as one can tell without its base")
        say(f"{jobs[0].model} is not on this machine yet: the run checks lora.target_modules and the tokens")


def _say_stopping() -> None:
    with contextlib.suppress(OSError):
        # Not by print: the signal may have come in the middle of one, and a stream's buffer cannot be entered twice.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

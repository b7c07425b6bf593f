"""`loramux train`: one adapter from a job file, with a progress bar."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.terminal.output import print_json, say, step_progress

if TYPE_CHECKING:
    from loramux_trainer.job import TrainConfig


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
    """Train a LoRA adapter on the frozen NF4 base; the output is a PEFT directory that `adapters push` takes.

    The first SIGTERM, SIGHUP or Ctrl-C saves a checkpoint and stops; `--resume` goes on from it.
    """
    from loramux_trainer.job_file import read_job_file
    from loramux_trainer.preflight import check_job
    from loramux_trainer.unbuilt import check_file_built

    file = read_job_file(job_file)
    check_file_built(file)
    job = file.jobs[0]
    if check:
        _check(job_file, job, resume=resume)
        return
    check_job(job, resume=resume)  # what can be known before torch is imported

    from loramux.terminal.training_bar import COLUMN, TrainingBar
    from loramux_trainer.interrupt import stop_on_signals
    from loramux_trainer.run import train

    with stop_on_signals(_say_stopping) as stop, step_progress(COLUMN) as bar:
        result = train(job, resume=resume, progress=TrainingBar(bar, job.output.name), stop=stop)
    if as_json:
        print_json(result)
        return
    held_out = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4f}"
    print(f"{result.output}: {result.steps} steps in {result.seconds:.1f} s, loss {result.loss:.4f}{held_out}")
    print(f"publish it with: loramux adapters push {result.output}")


def _check(job_file: Path, job: TrainConfig, *, resume: bool) -> None:
    from loramux_trainer.dry_run import check_whole_job

    if check_whole_job(job, resume=resume):
        print(f"ok: {job_file} is a valid job")
    else:
        print(f"ok: {job_file} is a valid job, as far as one can tell without its base")
        say(f"{job.model} is not on this machine yet: the run checks lora.target_modules and the tokens")


def _say_stopping() -> None:
    with contextlib.suppress(OSError):
        # Not by print: the signal may have come in the middle of one, and a stream's buffer cannot be entered twice.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

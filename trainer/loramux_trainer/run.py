"""The trainer's entry point: jobs from their files to their adapters. One job is a fleet of one."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from loramux_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from loramux_trainer.errors import DeviceFull, Diverged
from loramux_trainer.fleet.torch_errors import is_out_of_memory
from loramux_trainer.fleet_run import FleetOutcome, FleetRun
from loramux_trainer.halving_record import check_record
from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile
from loramux_trainer.member_run import TrainResult, output_directory
from loramux_trainer.preflight import check_job
from loramux_trainer.progress import FleetProgress, OneJob, Progress, Silent
from loramux_trainer.tracking.observer import TrackedFleet

__all__ = ["FleetOutcome", "TrainResult", "train", "train_file"]


def train(
    job: TrainConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Train one adapter and write it to `job.output`.

    With `resume`, continue from the newest checkpoint if there is one. `stop` is read between steps: when it is set
    the state is saved and Interrupted raised. Raises the errors of loramux_trainer.errors.
    """
    outcome = train_file(JobFile((job,)), resume=resume, progress=OneJob(progress or Silent()), stop=stop)
    for failure in outcome.failures.values():
        raise Diverged(f"{failure}; start again in another output with a lower training.learning_rate")
    (result,) = outcome.results.values()
    return result


def train_file(
    file: JobFile,
    *,
    resume: bool = False,
    progress: FleetProgress | None = None,
    stop: threading.Event | None = None,
) -> FleetOutcome:
    """Train the jobs of a file on one base, at most `fleet.max_members` at a time; the others wait for a place.

    A job that diverges is saved as it was before that step, and named among the failures; the others go on. Raises what
    `train` raises.
    """
    jobs = file.jobs
    for job in jobs:
        check_job(job, resume=resume)
    check_record(file, resume=resume)
    saved = {job.output: list_checkpoints(job.output / CHECKPOINTS) for job in jobs}
    with ExitStack() as outputs:
        for job in jobs:
            outputs.enter_context(output_directory(job.output))
        tracked = outputs.enter_context(TrackedFleet(progress or OneJob(Silent()), jobs))
        try:
            if jobs[0].engine == "trl":
                return _by_trl(jobs[0], tracked, stop or threading.Event())
            run = FleetRun(file, tracked)
            return run.go({output: found[-1] for output, found in saved.items() if found}, stop or threading.Event())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceFull from error


def _by_trl(job: TrainConfig, progress: FleetProgress, stop: threading.Event) -> FleetOutcome:
    # Seconds of imports, which a fleet need not wait for.
    from loramux_trainer.trl_engine.run import train_by_trl

    result = train_by_trl(job, progress=progress.of(job.run_name), stop=stop)
    progress.ended(job.run_name, "finished")
    return FleetOutcome({job.run_name: result}, {})

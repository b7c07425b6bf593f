"""What a job is refused for before anything is loaded: missing data, an output that cannot be written.

Imports no torch, so that `loramux train --check` is quick, and leaves nothing on disk.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from loramux_adapters.base.source import find_base
from loramux_adapters.errors import BaseInvalid
from loramux_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from loramux_trainer.data.columnar_files import is_dataset
from loramux_trainer.data.prompts import read_prompts
from loramux_trainer.data.records import read_records
from loramux_trainer.errors import JobInvalid, ModelInvalid, Problems
from loramux_trainer.finished import has_adapter, read_finished
from loramux_trainer.job import TrainConfig
from loramux_trainer.optimizers.devices import check_device
from loramux_trainer.reward_function import load_reward_function
from loramux_trainer.tracking.packages import missing_packages
from loramux_trainer.tracking.picture import is_drawable


def check_job(job: TrainConfig, *, resume: bool) -> None:
    """Raises JobInvalid and DataInvalid for what would end the run only after minutes of work, or at its end,
    ModelInvalid for a base that cannot be found or loaded, and SeveralInvalid for several of them.
    """
    problems = Problems()
    with problems.collecting():
        check_given_device(job)
    with problems.collecting():
        find_model(job)
    check_engine(job, problems)
    check_trackers(job, problems)
    check_paths(job, problems, resume=resume)
    check_records(job, problems)
    problems.raise_any()


def check_given_device(job: TrainConfig) -> None:
    """Raises DeviceInvalid for an optimizer that the job's device is not for; of `auto`, the run knows."""
    if job.training.device != "auto":
        check_device(job.training.optimizer, job.training.device)


def check_engine(job: TrainConfig, problems: Problems) -> None:
    """Whether what the job's engine needs is installed, and its reward function can be imported."""
    if job.engine != "trl":
        return
    missing = [name for name in ("trl", "peft") if find_spec(name) is None]
    if missing:
        what = f"trl needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        problems.add(JobInvalid("engine", f"{what}: install Loramux with the extra trl, or use engine: fleet"))
    elif job.loss.reward_function is not None:
        with problems.collecting():
            load_reward_function(job.loss.reward_function)


def check_trackers(job: TrainConfig, problems: Problems) -> None:
    """Whether their packages, and the one of the picture, are installed."""
    for name in missing_packages(job):
        extra = "install Loramux with the extra track" if name == "tensorboard" else f"pip install {name}"
        problems.add(JobInvalid("tracking.report_to", f"package {name} is not installed: {extra}, or leave it out"))
    if job.tracking.plot and not is_drawable():
        why = "package matplotlib is not installed: install Loramux with the extra plot, or leave it out"
        problems.add(JobInvalid("tracking.plot", why))


def find_model(job: TrainConfig) -> Path | None:
    """The directory of the base's files, None where they are still to be fetched. Raises ModelInvalid."""
    try:
        return find_base(job.model, os.environ)
    except BaseInvalid as error:
        raise ModelInvalid(str(error), remedy=error.remedy) from error


def check_paths(job: TrainConfig, problems: Problems, *, resume: bool) -> None:
    """Whether there is data to read and the output can be written."""
    for key, path in (("data.train", job.data.train), ("data.eval", job.data.eval)):
        if path is not None and not is_readable(path):
            problems.add(JobInvalid(key, f"{path} is not a readable file"))
    with problems.collecting():
        try:
            _check_output(job, resume=resume)
        except OSError as error:
            raise JobInvalid("output", f"{job.output} cannot be written: {error.strerror}") from error


def check_records(job: TrainConfig, problems: Problems) -> None:
    """The form of the records of what data there is."""
    if job.loss.name == "grpo":
        if is_readable(job.data.train):
            with problems.collecting():
                for _ in read_prompts(job.data.train, problems, job.data):
                    pass
        return
    for path in (job.data.train, job.data.eval):
        if path is not None and is_readable(path):
            with problems.collecting():
                for _ in read_records(path, problems, job.data, job.loss):
                    pass


def is_readable(path: Path) -> bool:
    """Whether there is a file to read, or a saved dataset."""
    return os.access(path, os.R_OK) and (not path.is_dir() or is_dataset(path))


def _check_output(job: TrainConfig, *, resume: bool) -> None:
    output = job.output
    if has_adapter(output):
        if not resume:
            raise JobInvalid(
                "output",
                f"{output} already has an adapter; choose another directory, or take it as it is with --resume",
            )
        read_finished(job)
        return
    saved = list_checkpoints(output / CHECKPOINTS)
    if saved and job.engine != "fleet":
        raise JobInvalid("output", f"{output} has checkpoints of engine: fleet; choose another directory")
    if not resume and saved:
        raise JobInvalid(
            "output",
            f"{output} has checkpoints of an unfinished run; continue with --resume, or choose another directory",
        )
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    # Writing is the only sure test: permission bits do not show a read-only or a full file system.
    with tempfile.TemporaryFile(dir=existing):
        pass

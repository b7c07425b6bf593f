"""What a job can be refused for before anything is loaded: data that is not there, an output that cannot be written.

Imports no torch, so that `lorica train --check` is quick, and leaves nothing on disk.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lorica_adapters.base_files import check_base_files
from lorica_adapters.errors import BaseInvalid
from lorica_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from lorica_trainer.errors import JobInvalid, ModelInvalid
from lorica_trainer.job import TrainJob
from lorica_trainer.records import read_records


def check_job(job: TrainJob, *, resume: bool) -> None:
    """Raises JobInvalid and DataInvalid for what would end the run only after minutes of work, or at its end, and
    ModelInvalid for a model directory that cannot be loaded.
    """
    if Path(job.model).is_dir():
        try:
            check_base_files(Path(job.model))
        except BaseInvalid as error:
            raise ModelInvalid(f"{job.model} cannot be loaded: {error}", remedy=error.remedy) from error
    for key, path in (("data.train", job.data.train), ("data.eval", job.data.eval)):
        if path is not None and (not os.access(path, os.R_OK) or path.is_dir()):
            raise JobInvalid(key, f"{path} is no file that can be read")
    try:
        _check_output(job.output, resume=resume)
    except OSError as error:
        raise JobInvalid("output", f"{job.output} cannot be written: {error.strerror}") from error
    for path in (job.data.train, job.data.eval):
        for _ in read_records(path) if path is not None else ():
            pass


def _check_output(output: Path, *, resume: bool) -> None:
    if (output / "adapter_config.json").exists():
        raise JobInvalid("output", f"{output} already holds an adapter; choose another directory")
    if not resume and list_checkpoints(output / CHECKPOINTS):
        raise JobInvalid(
            "output",
            f"{output} holds checkpoints of an unfinished run; go on with --resume, or choose another directory",
        )
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    # Writing is the only sure test: permission bits say nothing of a read-only or a full file system.
    with tempfile.TemporaryFile(dir=existing):
        pass

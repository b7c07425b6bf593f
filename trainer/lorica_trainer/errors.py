"""What can go wrong in a training run, by who must act."""

from __future__ import annotations

from pathlib import Path


class TrainerError(Exception):
    """Base of the family; `str(error)` is one sentence for the person who started the run."""


class JobInvalid(TrainerError):
    """The job file must be corrected. `field` is the dotted key, e.g. `training.learning_rate`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class ModelInvalid(JobInvalid):
    """The files of the model's directory cannot be loaded. `remedy` says what to do."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__("model", message)
        self.remedy = remedy


class DataInvalid(TrainerError):
    """The data must be corrected. `line` is 1-based, 0 when the whole file is meant."""

    def __init__(self, path: Path | str, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")
        self.line = line


class CheckpointInvalid(TrainerError):
    """A checkpoint cannot be resumed: torn, or of another job, base or data."""


class Diverged(TrainerError):
    """Loss or gradient is not finite. Resuming would end the same way: the job must be another."""


class OutputFailed(TrainerError):
    """The output cannot be written any more. What was saved before is still good."""


class DeviceFull(TrainerError):
    """The job needs more memory than the device has."""


class BaseChanged(TrainerError):
    """The frozen base is not what it was before training. Nothing was exported."""


class Interrupted(TrainerError):
    """The run was asked to stop and did; resume goes on from `checkpoint`, None where no step had been taken."""

    def __init__(self, checkpoint: Path | None) -> None:
        saved = f"after saving {checkpoint}; run again with --resume to go on"
        super().__init__(f"stopped {saved}" if checkpoint else "stopped before the first step; nothing is saved")
        self.checkpoint = checkpoint

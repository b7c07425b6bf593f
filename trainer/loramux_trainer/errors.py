"""What can go wrong in a training run, by what must be corrected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_MOST_SHOWN = 20


class TrainerError(Exception):
    """Base of the family; `str(error)` is one sentence for the person who started the run."""


class JobInvalid(TrainerError):
    """The job file must be corrected. `field` is the dotted key (`training.learning_rate`), `message` what is wrong,
    `remedy` what to do where that does not say it.
    """

    def __init__(self, field: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.message, self.remedy = field, message, remedy


class KeyRenamed(JobInvalid):
    """A key has another name here: `message` goes on from the key, as in `was renamed to training.max_grad_norm`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.args = (f"{field} {message}",)


class ModelInvalid(JobInvalid):
    """The base cannot be found, loaded or trained exactly."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__("model", message, remedy=remedy)


class DeviceInvalid(JobInvalid):
    """This machine lacks the device or the dtype that the job asks for."""


class DataInvalid(TrainerError):
    """The data must be corrected. `line` is 1-based, 0 when the whole file is meant; of Parquet and Arrow the row."""

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

    def __init__(self) -> None:
        super().__init__(
            "the device has too little memory for this job; lower data.max_length, or set "
            "training.gradient_checkpointing"
        )


class BaseChanged(TrainerError):
    """The frozen base is not what it was before training. Nothing was exported."""


class Interrupted(TrainerError):
    """The run was stopped on request; resume continues from `checkpoints`, none where no step had been taken."""

    def __init__(
        self, checkpoints: Sequence[Path], said: str = "stopped before the first step; nothing is saved"
    ) -> None:
        """`said` where there is no checkpoint."""
        several = f" and {len(checkpoints) - 1} more" if len(checkpoints) > 1 else ""
        if checkpoints:
            super().__init__(f"stopped after saving {checkpoints[0]}{several}; run again with --resume to continue")
        else:
            super().__init__(said)
        self.checkpoints = tuple(checkpoints)


class SeveralInvalid(TrainerError):
    """Two or more things must be corrected; `str(error)` has a line for each of the first ones."""

    def __init__(self, problems: Iterable[TrainerError], count: int) -> None:
        self.problems, self.count = tuple(problems), count
        lines = [f"  {_with_remedy(problem)}" for problem in self.problems]
        more = [f"  and {count - len(lines)} more"] if count > len(lines) else []
        super().__init__("\n".join([f"{count} things are wrong:", *lines, *more]))


class Problems:
    """Collects mistakes, to report them together. Keeps the first ones and counts the others."""

    def __init__(self) -> None:
        self._kept: list[TrainerError] = []
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, problem: TrainerError) -> None:
        """Add one; a SeveralInvalid is added problem by problem."""
        if isinstance(problem, SeveralInvalid):
            self._count += problem.count - len(problem.problems)
            for one in problem.problems:
                self.add(one)
            return
        self._count += 1
        if len(self._kept) < _MOST_SHOWN:
            self._kept.append(problem)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Adds the problem that the block raises, and continues after the block."""
        try:
            yield
        except (JobInvalid, DataInvalid, SeveralInvalid) as problem:
            self.add(problem)

    def raise_any(self) -> None:
        """Raise `whole()` where there is a problem."""
        if self:
            raise self.whole()

    def whole(self) -> TrainerError:
        """The one problem as it was raised, or SeveralInvalid; there must be one."""
        return self._kept[0] if self._count == 1 else SeveralInvalid(self._kept, self._count)


def _with_remedy(problem: TrainerError) -> str:
    remedy = getattr(problem, "remedy", "")
    return f"{problem}; {remedy}" if remedy else str(problem)

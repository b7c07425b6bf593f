"""The reports of a running job. The trainer prints nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loramux_trainer.data.dataset import DataReport


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `step` counts from 1; `loss` is the mean over the step's supervised tokens."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # supervised, in this step
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the loss, by trl's names


@dataclass(frozen=True)
class EvalReport:
    """The mean loss over all supervised tokens of the evaluation set after `step` steps."""

    step: int
    loss: float


class Progress(Protocol):
    """Callbacks from the training thread, in order; an exception in one ends the run."""

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...
    def saved(self, checkpoint: Path) -> None: ...
    def warned(self, message: str) -> None: ...


class Silent:
    """A Progress that ignores every report."""

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """Nothing."""

    def stepped(self, report: StepReport) -> None:
        """Nothing."""

    def evaluated(self, report: EvalReport) -> None:
        """Nothing."""

    def saved(self, checkpoint: Path) -> None:
        """Nothing."""

    def warned(self, message: str) -> None:
        """Nothing."""


class FleetProgress(Protocol):
    """Callbacks of a run of several jobs."""

    def of(self, name: str) -> Progress:
        """Those of one job."""
        ...

    def warned(self, message: str) -> None:
        """Of what concerns all."""
        ...

    def ended(self, name: str, state: str) -> None:
        """A job takes part no more: finished, stopped (by successive halving), diverged, failed (to be written) or
        refused.
        """
        ...


class OneJob:
    """A FleetProgress for a run of one job."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def of(self, name: str) -> Progress:
        """The job's."""
        return self._progress

    def warned(self, message: str) -> None:
        """The job's."""
        self._progress.warned(message)

    def ended(self, name: str, state: str) -> None:
        """Its caller knows."""

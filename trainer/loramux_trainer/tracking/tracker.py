"""What a tracker does: it takes scalars by step. Knows no package of any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from loramux_trainer.job import TrainConfig


class Tracker(Protocol):
    """One run at one tracker. Any of its methods may raise whatever its package does."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars after `step` steps, counted from 1, by transformers' names."""
        ...

    def flush(self) -> None:
        """A checkpoint was saved: what was logged until now is not logged again after a resume."""
        ...

    def close(self, *, finished: bool) -> None:
        """The run has ended; not `finished`: it was stopped, diverged or failed."""
        ...


Open = Callable[[TrainConfig, int], Tracker]
"""(job, steps that were taken before) -> its tracker; what was logged of later steps is to be forgotten."""


def config_of(job: TrainConfig) -> dict[str, Any]:
    """What a tracker shows of a job beside its curves."""
    return job.to_dict()

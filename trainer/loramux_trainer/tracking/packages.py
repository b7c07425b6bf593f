"""The packages of trackers: which are missing, and each one's run. Nothing of them is imported before a run begins.

W&B and MLflow read their own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from loramux_trainer.job import TrainConfig
from loramux_trainer.schema.tracking_config import TrackerName
from loramux_trainer.tracking.tracker import Open, Tracker, config_of

LOGS = "logs"
"""Below the output: TensorBoard's files."""

_PROJECT = "loramux"
_FLUSH_SECONDS = 10


class _TensorBoard:
    """`purge_step` tells the reader that what an earlier process wrote of later steps is void."""

    def __init__(self, job: TrainConfig, taken: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(job.output / LOGS), purge_step=taken + 1, flush_secs=_FLUSH_SECONDS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See Tracker."""
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._writer.close()


class _WandB:
    """A run that is resumed begins a new one here, with the steps that it takes."""

    def __init__(self, job: TrainConfig, taken: int) -> None:
        self._run: Any = import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=job.run_name,
            config=config_of(job),
            dir=str(job.output),
            reinit="create_new",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Its own process keeps what it was given."""

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if finished else 1)


class _MlFlow:
    def __init__(self, job: TrainConfig, taken: int) -> None:
        self._client: Any = import_module("mlflow").MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        self._run: str = self._client.create_run(experiment, run_name=job.run_name).info.run_id
        for key, value in config_of(job).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self, *, finished: bool) -> None:
        """See Tracker."""
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")


OPEN: Final[Mapping[TrackerName, Open]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MlFlow}


def missing_packages(job: TrainConfig) -> list[TrackerName]:
    """Trackers of the job whose package, which has their name, is not installed."""
    return [name for name in job.tracking.report_to if find_spec(name) is None]


def open_tracker(name: TrackerName, job: TrainConfig, taken: int) -> Tracker:
    """Raises whatever its package does."""
    return OPEN[name](job, taken)

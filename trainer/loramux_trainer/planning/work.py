"""What a job's measurements begin with: its base's files, and how much there is to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from loramux_trainer.batches import StepOrder
from loramux_trainer.errors import ModelInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.preflight import find_model
from loramux_trainer.preparation import read_job_data


@dataclass(frozen=True)
class Work:
    """Optimizer steps, tokens of the examples in training and in evaluation, of one job or of several together."""

    steps: int
    tokens: int
    eval_tokens: int


def base_to_measure(job: TrainConfig) -> Path:
    """The directory of its files. Raises ModelInvalid where they are not on this machine: to fetch them is no part of
    a measurement.
    """
    base = find_model(job)
    if base is None:
        raise ModelInvalid(f"{job.model} is not on this machine, where it would be measured", remedy="fetch it")
    return base


def work_of(jobs: Iterable[TrainConfig]) -> Work:
    """Reads their data. Raises JobInvalid, DataInvalid, SeveralInvalid."""
    works = [_work_of(job) for job in jobs]
    return Work(*(sum(values) for values in zip(*map(astuple, works), strict=True)))


def _work_of(job: TrainConfig) -> Work:
    training, data = job.training, read_job_data(job).data
    lengths = [unit.tokens for unit in data.train]
    order = StepOrder.of(training, lengths)
    epochs = training.num_train_epochs if training.max_steps is None else training.max_steps / order.steps_per_epoch
    steps = training.max_steps or training.num_train_epochs * order.steps_per_epoch
    evaluations = -(-steps // (training.eval_steps or order.steps_per_epoch))
    return Work(steps, round(epochs * sum(lengths)), evaluations * sum(unit.tokens for unit in data.eval))

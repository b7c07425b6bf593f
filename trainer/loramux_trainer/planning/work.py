"""How much there is to do in a job: steps, and tokens of its examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from loramux_trainer.batches import StepOrder
from loramux_trainer.job import TrainConfig
from loramux_trainer.preparation import read_job_data


@dataclass(frozen=True)
class Work:
    """Optimizer steps, tokens of the examples in training and in evaluation, of one job or of several together."""

    steps: int
    tokens: int
    eval_tokens: int


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

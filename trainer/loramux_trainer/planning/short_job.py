"""A job cut short, so that what it takes can be measured, and what is seen of it."""

from __future__ import annotations

import dataclasses
import time
from itertools import pairwise

from loramux_trainer.job import TrainConfig
from loramux_trainer.progress import EvalReport, Silent, StepReport
from loramux_trainer.schema.optim_config import OptimConfig


def few_steps(job: TrainConfig, steps: int) -> OptimConfig:
    """Its training for `steps` steps with one evaluation behind them, where it has any."""
    plain = OptimConfig()
    evaluates = job.data.eval is not None or bool(job.data.eval_fraction)
    return dataclasses.replace(
        job.training,
        max_steps=steps,
        num_train_epochs=plain.num_train_epochs,
        lr_scheduler_type=plain.lr_scheduler_type,
        lr_scheduler_kwargs=plain.lr_scheduler_kwargs,
        warmup_steps=plain.warmup_steps,
        eval_steps=steps if evaluates else None,
        early_stopping_patience=plain.early_stopping_patience,
        early_stopping_threshold=plain.early_stopping_threshold,
        load_best_model_at_end=False,
    )


class Watch(Silent):
    """When steps and evaluations ended, and what they said. Of all members together, which step together."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.eval_loss: float | None = None
        self._evals: list[float] = []
        self._last: dict[int, float] = {}

    def of(self, name: str) -> Watch:
        """One for all."""
        return self

    def ended(self, name: str, state: str) -> None:
        """Nothing."""

    def stepped(self, report: StepReport) -> None:
        """All members of a step report one after the other: the first counts."""
        if report.step not in self._last:
            self._last[report.step] = time.monotonic()
            self.losses.append(report.loss)

    def evaluated(self, report: EvalReport) -> None:
        """After the last step."""
        self._evals.append(time.monotonic())
        self.eval_loss = report.loss

    def seconds_of_steps(self) -> list[float]:
        """Of all but the first, which allocates."""
        return [later - earlier for earlier, later in pairwise(self._last.values())]

    def eval_seconds(self) -> float:
        """Of the one evaluation."""
        return max(self._evals) - max(self._last.values()) if self._evals else 0.0

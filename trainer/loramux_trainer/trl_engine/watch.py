"""What transformers' trainer says while it trains, as our reports; and its end where a run is stopped or diverges."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from loramux_trainer.data.dataset import DataReport
from loramux_trainer.errors import Diverged
from loramux_trainer.progress import EvalReport, Progress, StepReport

_OURS = frozenset({"loss", "grad_norm", "learning_rate", "epoch"})


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the history of a run. `tokens_of`: 0-based step, metrics -> tokens with a loss."""

    def __init__(
        self,
        progress: Progress,
        report: DataReport,
        stop: threading.Event,
        tokens_of: Callable[[int, dict[str, float]], int],
    ) -> None:
        self._progress, self._report, self._stop, self._tokens_of = progress, report, stop, tokens_of
        self.steps: list[StepReport] = []
        self.evals: list[EvalReport] = []
        self.was_stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first step begins."""
        self._progress.started(state.max_steps, state.global_step, self._report)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
        """After each step; the run stops once it is asked to. Raises Diverged."""
        self._take(state.global_step, dict(logs or {}))
        if self._stop.is_set() and state.global_step < state.max_steps:
            control.should_training_stop = self.was_stopped = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """trl's mean over batches."""
        if self.evals and self.evals[-1].step == state.global_step:
            self._progress.evaluated(self.evals[-1])

    def _take(self, step: int, logs: dict[str, Any]) -> None:
        if "eval_loss" in logs:
            self.evals.append(EvalReport(step, float(logs["eval_loss"])))
        if "loss" not in logs:
            return
        metrics = {name: float(value) for name, value in logs.items() if _is_metric(name, value)}
        report = StepReport(
            step,
            float(logs["loss"]),
            float(logs["learning_rate"]),
            float(logs.get("grad_norm", 0.0)),
            self._tokens_of(step - 1, metrics),
            metrics,
        )
        if not (math.isfinite(report.loss) and math.isfinite(report.gradient_norm)):
            raise Diverged(f"loss or gradient is not finite at step {step}; lower training.learning_rate")
        self.steps.append(report)
        self._progress.stepped(report)


def _is_metric(name: str, value: object) -> bool:
    return name not in _OURS and name != "step" and isinstance(value, (int, float)) and math.isfinite(value)

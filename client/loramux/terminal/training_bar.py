"""A training run as a progress bar: steps, loss, time left. Implements the trainer's Progress by its methods.

Where nobody watches, each evaluation is a line, and where the run stands once a minute.
Knows the trainer's reports by their attributes only, so that importing this loads no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loramux.terminal.output import visible

if TYPE_CHECKING:
    from rich.progress import Progress

    from loramux_trainer.data.dataset import DataReport
    from loramux_trainer.progress import EvalReport, StepReport

SECONDS_OF_LINE = 60.0
"""From one line to the next where nobody watches."""


def loss_text(loss: float) -> str:
    """Of one width, but for what is on its way to diverge."""
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.2e}"


class TrainingBar:
    """One task in `bar`; its fields `loss` and `eval_loss` are text."""

    def __init__(self, bar: Progress, description: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._description, self._clock = bar, visible(description), clock
        self._line_at = clock() + SECONDS_OF_LINE
        self._task = bar.add_task(
            self._description, total=None, loss="loading", eval_loss="", visible=bar.console.is_interactive
        )

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """The data is read and the first step begins."""
        self._bar.update(self._task, total=total_steps, completed=first_step, loss="", visible=True)
        self._say(f"{self._description}: {data.describe()}")

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=report.step, loss=f"loss {loss_text(report.loss)}")
        if self._clock() >= self._line_at:
            self._line_at = self._clock() + SECONDS_OF_LINE
            self._say_unwatched()

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation is done."""
        self._bar.update(self._task, eval_loss=f"eval {loss_text(report.loss)}")
        if not self._bar.tasks[self._task].finished:  # else the last state says the same
            self._say_unwatched()

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on disk."""
        self._say(f"saved {checkpoint}")

    def warned(self, message: str) -> None:
        """Something that the user should know of."""
        self._say(f"warning: {message}")

    def _say_unwatched(self) -> None:
        if not self._bar.console.is_interactive:
            task = self._bar.tasks[self._task]
            done = f"step {task.completed:.0f}/{task.total or 0:.0f}"
            self._say(
                ", ".join([f"{self._description}: {done}", *filter(None, map(task.fields.get, ("loss", "eval_loss")))])
            )

    def _say(self, message: str) -> None:
        self._bar.console.print(visible(message, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)


COLUMN = "{task.fields[loss]} {task.fields[eval_loss]}"

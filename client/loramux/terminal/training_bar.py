"""A training run as a progress bar: steps, loss, time left. Implements the trainer's Progress by its methods.

Knows the trainer's reports by their attributes only, so that importing this loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from loramux_trainer.data.dataset import DataReport
    from loramux_trainer.progress import EvalReport, StepReport


class TrainingBar:
    """One task in `bar`; its fields `loss` and `eval_loss` are text."""

    def __init__(self, bar: Progress, description: str) -> None:
        self._bar, self._description = bar, description
        self._task = bar.add_task(
            description, total=None, loss="loading", eval_loss="", visible=bar.console.is_terminal
        )

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """The data is read and the first step begins."""
        self._bar.update(self._task, total=total_steps, completed=first_step, loss="", visible=True)
        self._say(f"{self._description}: {data.describe()}")

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=report.step, loss=f"loss {report.loss:.4f}")

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation is done."""
        self._bar.update(self._task, eval_loss=f"eval {report.loss:.4f}")

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on disk."""
        self._say(f"saved {checkpoint}")

    def warned(self, message: str) -> None:
        """Something that the user should know of."""
        self._say(f"warning: {message}")

    def _say(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)


COLUMN = "{task.fields[loss]} {task.fields[eval_loss]}"

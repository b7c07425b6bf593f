"""Several training runs as a live table: step, loss, eval loss, tokens a second, state. Implements FleetProgress.

Where nobody watches, each job's begin and end is a line. Knows the trainer's reports by their attributes only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from loramux_trainer.data.dataset import DataReport
    from loramux_trainer.progress import EvalReport, StepReport

_MOST_SHOWN = 40


class TrainingTable:
    """A context manager, since a live table takes the terminal."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._rows = {name: _Row(name, self) for name in names}
        self._live = Live(self._table(), console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> TrainingTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def of(self, name: str) -> _Row:
        """One job's row, which is its Progress."""
        return self._rows[name]

    def warned(self, message: str) -> None:
        """Something that concerns all."""
        self.say(f"warning: {message}")

    def ended(self, name: str, state: str) -> None:
        """A job takes part no more."""
        row = self._rows[name]
        row.state = state
        self.changed()
        if not row.steps:
            self.say(f"{name}: {state} before this run")
        elif not self._console.is_terminal:
            self.say(f"{name}: {state} at step {row.step}, loss {row.loss or '-'}, eval loss {row.eval_loss or '-'}")

    def say(self, message: str) -> None:
        """A line above the table."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def changed(self) -> None:
        """Draws what is there now."""
        if self._console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table("job", "step", "loss", "eval", "tokens/s", "state")
        order = sorted(self._rows.values(), key=lambda row: (row.state != "running", row.state == "waiting"))
        for row in order[:_MOST_SHOWN]:
            table.add_row(row.name, row.steps, row.loss, row.eval_loss, row.rate, row.state)
        if len(order) > _MOST_SHOWN:
            table.caption = f"and {len(order) - _MOST_SHOWN} more"
        return table


class _Row:
    """One job; its fields are text."""

    def __init__(self, name: str, table: TrainingTable) -> None:
        self.name, self._table = name, table
        self.step, self._total = 0, 0
        self.loss = self.eval_loss = self.rate = ""
        self.state = "waiting"
        self._seen: tuple[float, int] | None = None  # when the rate's count began, and its tokens

    @property
    def steps(self) -> str:
        """Done and all."""
        return f"{self.step}/{self._total}" if self._total else ""

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """The job's first step begins."""
        self._total, self.step, self.state = total_steps, first_step, "running"
        self._table.say(f"{self.name}: {data.describe()}")
        self._table.changed()

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        now = time.monotonic()
        if self._seen is None:
            self._seen = (now, 0)
        else:
            began, tokens = self._seen
            self._seen = (began, tokens + report.tokens)
            self.rate = f"{(tokens + report.tokens) / max(now - began, 1e-9):,.0f}"
        self.step, self.loss = report.step, f"{report.loss:.4f}"
        self._table.changed()

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation is done."""
        self.eval_loss = f"{report.loss:.4f}"
        self._table.changed()

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on disk; the table is no place for it."""

    def warned(self, message: str) -> None:
        """Something that the user should know of."""
        self._table.say(f"warning: {self.name}: {message}")

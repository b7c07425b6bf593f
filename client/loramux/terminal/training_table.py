"""Several training runs as a live table: a bar a job, losses, time left, and a line of all together.

Implements FleetProgress. Where nobody watches, begins, evaluations and ends are lines, and once a minute the line of
all. Knows the trainer's reports by their attributes only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loramux.terminal.output import visible
from loramux.terminal.training_bar import SECONDS_OF_LINE, loss_text

if TYPE_CHECKING:
    from loramux_trainer.data.dataset import DataReport
    from loramux_trainer.progress import EvalReport, StepReport

_STYLES = {
    "running": "",
    "waiting": "dim",
    "stopped": "dim",
    "finished": "green",
    "diverged": "red",
    "failed": "red",
    "refused": "red",
}
_BAR = 8  # columns, at least
_NAME = 8  # columns, at least
_AROUND = 3  # lines of the terminal beside rows and the line of all


class TrainingTable:
    """A context manager, since a live table takes the terminal. `marks_best`: evaluation losses can be compared."""

    def __init__(
        self,
        console: Console,
        names: Sequence[str],
        *,
        marks_best: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._marks_best, self.clock = console, marks_best, clock
        self._rows = {name: _Row(name, self) for name in names}
        self._began: float | None = None  # the first step's end, from which tokens count
        self._tokens = 0
        self._line_at = clock() + SECONDS_OF_LINE
        # 36 rows are 50 ms of rich's, which the training thread waits for.
        self._live = Live(get_renderable=self.drawn, console=console, refresh_per_second=1, transient=False)

    def __enter__(self) -> TrainingTable:
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_interactive:
            self._live.refresh()
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
        if not row.total:
            self.say(f"{name}: {state} before this run" if state in ("finished", "stopped") else f"{name}: {state}")
        else:
            self.say_unwatched(f"{name}: {state} at {row.described()}")

    def say(self, message: str) -> None:
        """A line above the table."""
        self._console.print(visible(message, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)

    def say_unwatched(self, message: str) -> None:
        """A line where there is no table."""
        if not self._console.is_interactive:
            self.say(message)

    def stepped(self, tokens: int) -> None:
        """A row took a step."""
        now = self.clock()
        if self._began is None:
            self._began = now
        else:
            self._tokens += tokens
        if now >= self._line_at:
            self._line_at = now + SECONDS_OF_LINE
            self.say_unwatched(self.total())

    def total(self) -> str:
        """All jobs in one line: their states, supervised tokens a second, time left."""
        rows = list(self._rows.values())
        counts = Counter(row.state for row in rows)
        parts = [f"{len(rows)} jobs: " + ", ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state])]
        if self._began is not None and self._tokens:
            parts.append(f"{self._tokens / max(self.clock() - self._began, 1e-9):,.0f} tokens/s")
        left = [row.seconds_left() for row in rows if row.state == "running"]
        if left and None not in left and not counts["waiting"]:  # nobody knows yet how long the others take
            parts.append(f"{clock_time(max(seconds for seconds in left if seconds is not None))} left")
        return "; ".join(parts)

    def drawn(self) -> Group:
        """The table as it is now: of rows and columns those that the terminal has place for."""
        rows, best, width = list(self._rows.values()), self._best(), self._console.width
        total = Text(self.total() + ("; * best eval" if best is not None else ""), style="dim")
        most = self._console.height - _AROUND - len(total.wrap(self._console, width))
        if len(rows) > most:
            rows.sort(key=lambda row: (row.state != "running", row.state == "waiting"))
            more = Text(f"; {len(rows)} more not shown")
            most = max(1, self._console.height - _AROUND - len((total + more).wrap(self._console, width)))
            total.append(f"; {len(rows) - most} more not shown" if len(rows) > most else "")
        shown = [(row.shown_name, row, row.cells(row is best)) for row in rows[:most]]
        columns = {"": _BAR} | {
            head: max([cell_len(head), *(cell_len(cells[at].plain) for *_, cells in shown)])
            for at, head in enumerate(_HEADS)
        }
        for head in _DISPENSABLE:
            if _free(columns, width) >= _NAME:
                break
            del columns[head]
        free = max(1, _free(columns, width))
        bar = min(40, _BAR + max(0, free - max(map(cell_len, ["job", *(name for name, *_ in shown)]))))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("job", no_wrap=True)
        for head in columns:
            table.add_column(head, no_wrap=True, justify="left" if head in ("", "state") else "right")
        for name, row, cells in shown:
            progress = ProgressBar(total=row.total or 1, completed=row.step if row.total else 0, width=bar)
            by_head: dict[str, ProgressBar | Text] = {"": progress, **dict(zip(_HEADS, cells, strict=True))}
            name_width = free - (bar - _BAR if "" in columns else 0)
            table.add_row(Text(_in_width(name, name_width)), *(by_head[head] for head in columns))
        return Group(table, total)

    def _best(self) -> _Row | None:
        known = {row.eval_loss: row for row in reversed(self._rows.values()) if row.eval_loss is not None}
        return known[min(known)] if self._marks_best and len(known) > 1 else None


_HEADS = ("step", "loss", "eval", "left", "state")
_DISPENSABLE = ("", "left", "loss", "eval", "state")
"""Columns in the order in which a narrow terminal is without them; the first is the bar."""


class _Row:
    """One job, which is a Progress."""

    def __init__(self, name: str, table: TrainingTable) -> None:
        self.name, self.shown_name, self._table = name, visible(name), table
        self.step, self.total = 0, 0
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.state = "waiting"
        self._began: tuple[float, int] | None = None  # the end of the first step seen, and its number

    def started(self, total_steps: int, first_step: int, data: DataReport) -> None:
        """The job's first step begins."""
        self.total, self.step, self.state = total_steps, first_step, "running"
        self._table.say(f"{self.name}: {data.describe()}")

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        self.step, self.loss = report.step, report.loss
        if self._began is None:
            self._began = (self._table.clock(), report.step)
        self._table.stepped(report.tokens)

    def evaluated(self, report: EvalReport) -> None:
        """An evaluation is done."""
        self.eval_loss = report.loss
        if self.step < self.total:  # else its end says the same
            self._table.say_unwatched(f"{self.name}: {self.described()}")

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on disk; the table is no place for it."""

    def warned(self, message: str) -> None:
        """Something that the user should know of."""
        self._table.say(f"warning: {self.name}: {message}")

    def described(self) -> str:
        """Where it is, in words."""
        return f"step {self.step}/{self.total}, loss {_number(self.loss)}, eval loss {_number(self.eval_loss)}"

    def seconds_left(self) -> float | None:
        """By its own steps until now; None before there are two."""
        if self._began is None or self.step <= self._began[1]:
            return None
        began, first = self._began
        return (self.total - self.step) * (self._table.clock() - began) / (self.step - first)

    def cells(self, is_best: bool) -> tuple[Text, ...]:
        """By _HEADS."""
        left = self.seconds_left() if self.state == "running" else None
        evaluated = Text("" if self.eval_loss is None else _number(self.eval_loss) + ("*" if is_best else ""))
        if is_best:
            evaluated.stylize("bold green")
        return (
            Text(f"{self.step}/{self.total}" if self.total else ""),
            Text("" if self.loss is None else _number(self.loss)),
            evaluated,
            Text("" if left is None else clock_time(left)),
            Text(self.state, style=_STYLES.get(self.state, "")),
        )


def _number(loss: float | None) -> str:
    return "-" if loss is None else loss_text(loss)


def _free(columns: Mapping[str, int], width: int) -> int:
    """What is left for names, with two columns between all."""
    return width - sum(columns.values()) - 2 * len(columns)


def clock_time(seconds: float) -> str:
    """`0:01:20`."""
    return str(timedelta(seconds=round(seconds)))


def _in_width(name: str, width: int) -> str:
    """Begin and end of a name that is too long: names of a sweep differ at either."""
    if cell_len(name) <= width:
        return name
    head = (width - 1) // 2
    room = width - 1 - head
    tail = name[len(name) - room :]
    while cell_len(tail) > room:
        tail = tail[1:]
    return set_cell_size(name, head) + "…" + tail

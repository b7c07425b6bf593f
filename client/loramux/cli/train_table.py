"""`loramux train --table`: the rows as they are measured, then the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loramux.terminal.failures import CommandError
from loramux.terminal.output import count_progress, decimal_size, duration, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loramux_trainer.planning.rows import Row
    from loramux_trainer.planning.table import MeasuredRow

STEPS = 20
_COLUMNS = ("BASE", "BY", "ADAPTED", "RANK", "OPTIMIZER", "TRAINED", "STEP", "THE RUN", "PEAK", "LOSS", "EVAL LOSS")
_BY = {"peft": "PEFT", "fleet": "Loramux"}


def table(job_file: Path, steps: int, *, as_json: bool) -> None:
    """Measures and prints it, up to where it is interrupted. Raises CommandError where no row could be measured."""
    from loramux_trainer.planning.rows import ROWS
    from loramux_trainer.planning.table import measure_table

    measured: list[MeasuredRow] = []
    try:
        with count_progress() as bar:
            task = bar.add_task(f"{steps} steps of each row", total=len(ROWS), visible=bar.console.is_interactive)
            for row in measure_table(job_file, steps):
                measured.append(row)
                bar.advance(task)
    except KeyboardInterrupt:
        if measured:
            _show(measured, as_json=as_json)
        raise
    _show(measured, as_json=as_json)
    if all(row.failure for row in measured):
        raise CommandError("no row could be measured")


def _show(measured: Sequence[MeasuredRow], *, as_json: bool) -> None:
    if as_json:
        print_json(measured)
    else:
        print_table(_COLUMNS, [_cells(row) for row in measured], empty="")
    for row in measured:
        if row.failure:
            base, by, adapted, rank, optimizer = _name(row.row)
            say(f"{base}, {by}, {adapted}, rank {rank}, {optimizer}: {row.failure}")


def _name(row: Row) -> tuple[str, ...]:
    """In the first columns."""
    return "NF4" if row.bits == 4 else "bfloat16", _BY[row.by], row.adapted, str(row.rank), row.optimizer


def _cells(measured: MeasuredRow) -> list[str]:
    trial, name = measured.trial, _name(measured.row)
    if trial is None:
        return [*name, *["-"] * (len(_COLUMNS) - len(name))]
    return [
        *name,
        f"{trial.parameters:,}",
        f"{measured.step_seconds:.3g} s",
        duration(measured.run_seconds),
        decimal_size(trial.peak),
        f"{trial.loss:.4f}",
        "-" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
    ]

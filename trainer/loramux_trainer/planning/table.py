"""`loramux train --table`: the table people quote of LoRA and QLoRA, measured on the user's machine, base and examples.

Each row is trained for some steps in a process of its own, one after the other. Nothing of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from loramux_trainer.errors import JobInvalid, TrainerError
from loramux_trainer.job_file import read_job_file
from loramux_trainer.planning.apart import TrialFailed, run_apart
from loramux_trainer.planning.row_trial import RowRequest, RowTrial
from loramux_trainer.planning.rows import ROWS, Row, check_table
from loramux_trainer.planning.work import base_to_measure, work_of
from loramux_trainer.preflight import check_job

MeasureRow = Callable[[RowRequest], RowTrial]


@dataclass(frozen=True)
class MeasuredRow:
    """`trial` or why there is none. `step_seconds`: mean of all steps but the first. `run_seconds`: what training takes
    for all steps of the job, by its tokens.
    """

    row: Row
    trial: RowTrial | None = None
    step_seconds: float = 0.0
    run_seconds: float = 0.0
    failure: str = ""


def measure_table(
    path: Path, steps: int, *, rows: Sequence[Row] = ROWS, measure: MeasureRow | None = None
) -> Iterator[MeasuredRow]:
    """Row by row, of the one job in a file. A row that fails says so and ends no other one.

    Raises the errors of a run, before the first row.
    """
    file = read_job_file(path)
    if len(file.jobs) > 1 or file.sweep is not None:
        raise JobInvalid("jobs", "the table is of one job: give a file with one")
    if steps < 2:
        raise JobInvalid("training.max_steps", "the first step is left out of the times: measure 2 steps at least")
    (job,) = file.jobs
    check_table(job)
    check_job(job, resume=True)
    base_to_measure(job)
    tokens = work_of([job]).tokens
    return (_measured(RowRequest(str(path), row, steps), tokens, measure or in_process) for row in rows)


def in_process(request: RowRequest) -> RowTrial:
    """In a process of its own. Raises TrialFailed."""
    if request.row.by == "peft" and find_spec("peft") is None:
        raise TrialFailed("peft is not installed: install Loramux with the extra trl")
    return RowTrial(**run_apart("loramux_trainer.planning.row_trial", asdict(request), "it"))


def _measured(request: RowRequest, tokens: int, measure: MeasureRow) -> MeasuredRow:
    try:
        trial = measure(request)
    except TrainerError as error:
        return MeasuredRow(request.row, failure=str(error))
    return MeasuredRow(request.row, trial, trial.seconds / (request.steps - 1), trial.seconds / trial.tokens * tokens)

"""One row of the table, measured in a process of its own: the first steps of the job, trained as the row says.

By `python -m loramux_trainer.planning.row_trial`, see apart.py.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from loramux_trainer.errors import Diverged
from loramux_trainer.job_file import JobFile, read_job_file
from loramux_trainer.planning.apart import answer
from loramux_trainer.planning.rows import Row, job_of
from loramux_trainer.planning.short_job import Watch
from loramux_trainer.progress import StepReport

if TYPE_CHECKING:
    import torch

    from loramux_trainer.job import TrainConfig
    from loramux_trainer.preparation import JobData
    from loramux_trainer.schema.sweep_config import FleetConfig

_EVALUATED = 16  # batches of evaluation examples, at most
_LAST = 5  # steps whose mean is the loss


@dataclass(frozen=True)
class RowRequest:
    """`steps` of `row` on the first job of a file."""

    job_file: str
    row: Row
    steps: int


@dataclass(frozen=True)
class RowTrial:
    """Bytes and seconds. `loss`: mean of the last steps; `tokens` and `seconds`: of all steps but the first.

    `peak` is that of the training steps alone: neither the load nor evaluation and export are in it.
    """

    parameters: int
    loaded: int
    peak: int
    seconds: float
    tokens: int
    loss: float
    eval_loss: float | None


def measure(request: RowRequest, scratch: Path) -> RowTrial:
    """Runs the row in this process. Raises what a run would."""
    from loramux_adapters.memory import forget_peak, peak_bytes, used_bytes
    from loramux_trainer.preparation import find_device, read_job_data
    from loramux_trainer.targets import modules_of

    file = read_job_file(Path(request.job_file))
    first = file.jobs[0]
    device = find_device(first)
    job = job_of(first, request.row, request.steps, scratch / "row")
    prepared = _with_fewer_evals(read_job_data(job))
    watch = _PeakWatch(partial(peak_bytes, device))
    train = _loaded(request.row, prepared, file.fleet, device, watch)
    loaded = used_bytes(device)
    forget_peak(device)
    train()
    modules = [prepared.reading.outline.modules[name] for name in modules_of(job, prepared.reading.outline)]
    return RowTrial(
        parameters=sum(job.lora.rank * (module.in_features + module.out_features) for module in modules),
        loaded=loaded,
        peak=watch.peak,
        seconds=sum(watch.seconds_of_steps()),
        tokens=sum(_tokens_of_steps(job, prepared)[1:]),
        loss=mean(watch.losses[-_LAST:]),
        eval_loss=watch.eval_loss,
    )


def _loaded(
    row: Row, prepared: JobData, fleet: FleetConfig, device: torch.device, watch: Watch
) -> Callable[[], object]:
    """Loads the base, and gives what then trains on it, which raises Diverged."""
    if row.by == "peft":
        from loramux_trainer.trl_engine.peft_loop import PeftLoop

        return partial(PeftLoop(prepared, device, row.bits).go, watch)
    from loramux_trainer.fleet_run import FleetRun

    run = FleetRun(JobFile((prepared.job,), fleet), watch, read=lambda _: prepared, writes=False)

    def by_fleet() -> None:
        for failure in run.go({}, threading.Event()).failures.values():
            raise Diverged(failure)

    return by_fleet


class _PeakWatch(Watch):
    """Also the peak after the last step, before anything is evaluated or exported."""

    def __init__(self, peak_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._peak_bytes, self.peak = peak_bytes, 0

    def stepped(self, report: StepReport) -> None:
        """See Watch."""
        super().stepped(report)
        self.peak = self._peak_bytes()


def _with_fewer_evals(prepared: JobData) -> JobData:
    most = prepared.job.training.batch_size * _EVALUATED
    return dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, eval=prepared.data.eval[:most]))


def _tokens_of_steps(job: TrainConfig, prepared: JobData) -> list[int]:
    from loramux_trainer.batches import StepOrder

    lengths = [unit.tokens for unit in prepared.data.train]
    order = StepOrder.of(job.training, lengths)
    steps = range(job.training.max_steps or 0)
    return [sum(lengths[index] for batch in order.micro_batches(step) for index in batch) for step in steps]


def _answered(values: dict[str, Any], scratch: Path) -> RowTrial:
    return measure(RowRequest(values["job_file"], Row(**values["row"]), values["steps"]), scratch)


if __name__ == "__main__":
    answer(_answered)

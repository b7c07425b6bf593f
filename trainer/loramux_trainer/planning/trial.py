"""A few steps of a run on a base with few layers, in a process of its own: what it takes in memory and time.

The trainer's own code on some of the job's own data, by `python -m loramux_trainer.planning.trial`, see apart.py.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

from loramux_trainer.job_file import JobFile, read_job_file
from loramux_trainer.planning.apart import answer
from loramux_trainer.planning.short_job import Watch, few_steps
from loramux_trainer.schema.adapter_config import AdaloraConfig

if TYPE_CHECKING:
    from loramux_trainer.data.examples import Unit
    from loramux_trainer.job import TrainConfig
    from loramux_trainer.preparation import JobData

_STEPS = 3  # the first one allocates, and is left out of the time
_EVALUATED = 8  # batches of evaluation examples


@dataclass(frozen=True)
class Request:
    """`base`: the directory that takes the place of the jobs' model; it has so many layers."""

    job_file: str
    base: str
    layers: int


@dataclass(frozen=True)
class Trial:
    """Bytes and seconds; `step_tokens` and `eval_tokens` are of all jobs together, in one step and one evaluation."""

    layers: int
    process: int  # before the base is loaded
    loaded: int  # with it
    load_peak: int
    peak: int  # of training, evaluation and export
    load_seconds: float
    step_seconds: float
    step_tokens: int
    eval_seconds: float
    eval_tokens: int


def measure(request: Request, scratch: Path) -> Trial:
    """Runs the trial in this process: once with the longest examples, for the memory, and once with typical ones, for
    the time. Raises what the run would.
    """
    from loramux_adapters.memory import forget_peak, peak_bytes, used_bytes
    from loramux_trainer.fleet_run import FleetRun
    from loramux_trainer.preparation import find_device

    file = read_job_file(Path(request.job_file))
    device = find_device(file.jobs[0])
    process, begun = used_bytes(device), time.monotonic()
    longest = _Some(_longest)
    run = FleetRun(shortened(file, request.base, scratch / "memory"), Watch(), read=longest.read)
    load_seconds, loaded, load_peak = time.monotonic() - begun, used_bytes(device), peak_bytes(device)
    forget_peak(device)
    run.go({}, threading.Event())
    peak = peak_bytes(device)
    typical, watch = _Some(_typical), Watch()
    run = FleetRun(shortened(file, request.base, scratch / "time"), watch, read=typical.read)
    run.go({}, threading.Event())
    return Trial(
        layers=request.layers,
        process=process,
        loaded=loaded,
        load_peak=load_peak,
        peak=peak,
        load_seconds=load_seconds,
        step_seconds=median(watch.seconds_of_steps()),
        step_tokens=typical.step_tokens,
        eval_seconds=watch.eval_seconds(),
        eval_tokens=typical.eval_tokens,
    )


Choose: TypeAlias = "Callable[[Sequence[Unit], int], Sequence[Unit]]"


class _Some:
    """Reads data as a run does, and keeps some of it: what each job takes in a step, and a short evaluation."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.step_tokens = self.eval_tokens = 0

    def read(self, job: TrainConfig) -> JobData:
        """See preparation.read_job_data."""
        from loramux_trainer.preparation import read_job_data

        prepared = read_job_data(job)
        batch = job.training.batch_size
        train = tuple(self._choose(prepared.data.train, batch * job.training.gradient_accumulation_steps))
        held = tuple(self._choose(prepared.data.eval, batch * _EVALUATED))
        self.step_tokens += sum(unit.tokens for unit in train)
        self.eval_tokens += sum(unit.tokens for unit in held)
        return dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, train=train, eval=held))


def _longest(units: Sequence[Unit], count: int) -> Sequence[Unit]:
    return sorted(units, key=lambda unit: unit.tokens, reverse=True)[:count]


def _typical(units: Sequence[Unit], count: int) -> Sequence[Unit]:
    """Of all lengths, as often as they are."""
    ordered, count = sorted(units, key=lambda unit: unit.tokens), min(count, len(units))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def shortened(file: JobFile, base: str, scratch: Path) -> JobFile:
    """The jobs that train at once, those of the largest rank, for a few steps on `base`."""
    scratch.mkdir()
    most = file.fleet.max_members or len(file.jobs)
    jobs = sorted(file.jobs, key=lambda job: job.lora.rank, reverse=True)[:most]
    return JobFile(tuple(_short(job, base, scratch / job.run_name) for job in jobs), file.fleet)


def _short(job: TrainConfig, base: str, output: Path) -> TrainConfig:
    output.mkdir()
    training = few_steps(job, _STEPS)
    adalora = dataclasses.replace(job.adalora, tinit=AdaloraConfig().tinit, tfinal=AdaloraConfig().tfinal)
    return dataclasses.replace(job, model=base, output=output, training=training, adalora=adalora)


if __name__ == "__main__":
    answer(lambda values, scratch: measure(Request(**values), scratch))

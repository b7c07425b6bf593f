"""`loramux train --plan`: what a run will take, from trials on the first layers of its base.

A trial runs the trainer itself, so the plan knows no formula of what a method, a loss or an optimizer needs: what grows
with the number of layers grows in a straight line, everything else is there in the trial as in the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from loramux_adapters.memory import free_bytes
from loramux_trainer.job_file import read_job_file
from loramux_trainer.planning.apart import TrialFailed, run_apart
from loramux_trainer.planning.few_layers import layer_counts, write_few_layers
from loramux_trainer.planning.trial import Request, Trial
from loramux_trainer.planning.work import Work, base_to_measure, work_of
from loramux_trainer.preflight import check_job
from loramux_trainer.preparation import find_device

Measure = Callable[[Request], Trial]


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds. `peak` is the larger one of loading and of training; with it are the `process` with its
    libraries and the `base`. `free` is what the device has left now, where the process of the run is not yet there.
    """

    device: str
    layers: int
    measured_layers: tuple[int, ...]
    steps: int
    tokens: int
    process: int
    base: int
    loading: int
    training: int
    peak: int
    free: int
    load_seconds: float
    train_seconds: float
    eval_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.load_seconds + self.train_seconds + self.eval_seconds

    @property
    def fits(self) -> bool:
        """Whether the peak is below what is free."""
        return self.peak <= self.free


def make_plan(path: Path, *, measure: Measure | None = None) -> Plan:
    """Of the jobs in a file, looked at as a run looks at them. Raises the errors of a run, and TrialFailed."""
    file = read_job_file(path)
    for job in file.jobs:
        check_job(job, resume=True)
    first = file.jobs[0]
    if first.engine != "fleet":
        raise TrialFailed("only jobs with engine: fleet can be planned")
    base = base_to_measure(first)
    work, device = work_of(file.jobs), find_device(first)
    total, counts = layer_counts(base)
    with tempfile.TemporaryDirectory(prefix="loramux-plan-") as scratch:
        bases = {n: base if n == total else write_few_layers(base, Path(scratch) / f"{n}-layers", n) for n in counts}
        trials = [(measure or in_process)(Request(str(path), str(each), n)) for n, each in bases.items()]
    return plan_from(trials, total, work, device.type, free_bytes(device))


def plan_from(trials: Iterable[Trial], layers: int, work: Work, device: str, free: int) -> Plan:
    """Straight lines through one or two trials, at `layers`."""
    trials = list(trials)

    def at_all(values: Callable[[Trial], float]) -> float:
        first, last = trials[0], trials[-1]
        slope = (values(last) - values(first)) / max(1, last.layers - first.layers)
        return values(first) + slope * (layers - first.layers)

    last = trials[-1]
    eval_rate = at_all(lambda t: t.eval_seconds) / max(1, last.eval_tokens)
    loading, training = round(at_all(lambda t: t.load_peak)), round(at_all(lambda t: t.peak))
    process = max(trial.process for trial in trials)
    return Plan(
        device=device,
        layers=layers,
        measured_layers=tuple(trial.layers for trial in trials),
        steps=work.steps,
        tokens=work.tokens,
        process=process,
        base=round(at_all(lambda t: t.loaded)) - process,
        loading=loading,
        training=training,
        peak=max(loading, training),
        free=free,
        load_seconds=at_all(lambda t: t.load_seconds),
        train_seconds=at_all(lambda t: t.step_seconds) / last.step_tokens * work.tokens,
        eval_seconds=eval_rate * work.eval_tokens,
    )


def in_process(request: Request) -> Trial:
    """A trial in a process of its own, whose memory is then its own. Raises TrialFailed."""
    what = f"a trial on {request.layers} layers of the base"
    return Trial(**run_apart("loramux_trainer.planning.trial", asdict(request), what))

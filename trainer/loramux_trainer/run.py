"""Jobs from beginning to end on one frozen base: the trainer's entry point. One job is a fleet of one.

The base is fingerprinted at load and again before anything is exported.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loramux_adapters.base.load import BaseRefused, LoadedBase, refingerprint
from loramux_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from loramux_trainer.errors import BaseChanged, DeviceFull, Diverged, Interrupted, JobInvalid, ModelInvalid
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.memory import is_out_of_memory
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.halving import Best, Halving, best_of
from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile
from loramux_trainer.member_run import MemberRun, TrainResult, output_directory
from loramux_trainer.members import build_member
from loramux_trainer.optimizers.devices import check_device
from loramux_trainer.preflight import check_job
from loramux_trainer.preparation import (
    JobData,
    compute_dtype,
    enable_activation_checkpointing,
    examine_base,
    find_device,
    frozen_products,
    load,
    read_job_data,
)
from loramux_trainer.progress import FleetProgress, OneJob, Progress, Silent
from loramux_trainer.space import check_space

__all__ = ["FleetOutcome", "TrainResult", "train", "train_file"]

_SHARED = ("device", "compute_dtype", "frozen_products", "deterministic", "gradient_checkpointing")
"""Keys of `training` that all jobs of a fleet have in common: they are of the base, not of a job."""


@dataclass(frozen=True)
class FleetOutcome:
    """What became of each job, by name: a result, or why there is none. Failures: of those that diverged, and of those
    that were found invalid when they were to begin beside others under way.
    """

    results: dict[str, TrainResult]
    failures: dict[str, str]
    stopped: dict[str, str] = field(default_factory=dict)  # by successive halving
    best: Best | None = None  # of a sweep


def train(
    job: TrainConfig,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Train one adapter and write it to `job.output`.

    With `resume`, continue from the newest checkpoint if there is one. `stop` is read between steps: when it is set
    the state is saved and Interrupted raised. Raises the errors of loramux_trainer.errors.
    """
    outcome = train_file(JobFile((job,)), resume=resume, progress=OneJob(progress or Silent()), stop=stop)
    for failure in outcome.failures.values():
        raise Diverged(f"{failure}; start again in another output with a lower training.learning_rate")
    (result,) = outcome.results.values()
    return result


def train_file(
    file: JobFile,
    *,
    resume: bool = False,
    progress: FleetProgress | None = None,
    stop: threading.Event | None = None,
) -> FleetOutcome:
    """Train the jobs of a file on one base, at most `fleet.max_members` at a time; the others wait for a place.

    A job that diverges is saved as it was before that step, and named among the failures; the others go on. Raises what
    `train` raises, and JobInvalid where the jobs cannot share a base.
    """
    jobs = file.jobs
    check_together(jobs)
    for job in jobs:
        check_job(job, resume=resume)
    saved = {job.output: list_checkpoints(job.output / CHECKPOINTS) for job in jobs}
    with ExitStack() as outputs:
        for job in jobs:
            outputs.enter_context(output_directory(job.output))
        try:
            run = _FleetRun(file, progress or OneJob(Silent()))
            return run.go({output: found[-1] for output, found in saved.items() if found}, stop or threading.Event())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceFull(
                "the device has too little memory for this job; lower data.max_length, or set "
                "training.gradient_checkpointing"
            ) from error


def check_together(jobs: Sequence[TrainConfig]) -> None:
    """Raises JobInvalid where the jobs cannot share a base, or would write to one place."""
    if not jobs:
        raise JobInvalid("jobs", "has no job")
    first = jobs[0]
    for job in jobs[1:]:
        if job.model != first.model:
            raise JobInvalid("model", f"{job.model} and {first.model} are two bases; a fleet has one")
        for key in _SHARED:
            ours, theirs = getattr(job.training, key), getattr(first.training, key)
            if ours != theirs:
                raise JobInvalid(f"training.{key}", f"{ours} and {theirs} cannot go together: all jobs share the base")
    for what in ("name", "output"):
        values = [getattr(job, what) for job in jobs]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise JobInvalid(what, f"{twice} is that of two jobs")


class _FleetRun:
    """The base, the jobs that take part, and those that wait."""

    def __init__(self, file: JobFile, progress: FleetProgress) -> None:
        jobs, first = file.jobs, file.jobs[0]
        self._file, self._progress = file, progress
        self._most = file.fleet.max_members or len(jobs)
        halving = None if file.sweep is None else file.sweep.successive_halving
        if halving is not None and self._most < len(jobs):
            raise JobInvalid(
                "fleet.max_members",
                f"{self._most} of {len(jobs)} jobs at a time cannot be compared at a rung; remove it",
            )
        device = find_device(first)
        for job in jobs:
            check_device(job.training.optimizer, device.type)
        dtype, products = compute_dtype(first, device), frozen_products(first, device)
        self._waiting = [read_job_data(job) for job in jobs]
        for prepared in self._waiting:
            _warn_of_lost_ends(prepared, progress.of(_name(prepared.job)))
        self._base: LoadedBase = load(first, device, dtype)
        examined = examine_base(self._base, max(job.data.max_length + job.virtual_tokens for job in jobs))
        if first.training.gradient_checkpointing:
            enable_activation_checkpointing(self._base.model)
        try:
            self._model = FleetModel(
                self._base, examined, deterministic=first.training.deterministic, frozen_products=products
            )
        except BaseRefused as refusal:
            raise ModelInvalid(str(refusal)) from refusal
        self._fleet = Fleet(self._model, token_budget=file.fleet.token_budget, warn=progress.warned)
        self._runs: list[MemberRun] = []
        self._results: dict[str, TrainResult] = {}
        self._failures: dict[str, str] = {}
        self._stopped: dict[str, str] = {}
        self._last_evals: dict[str, float] = {}
        self._halving: Halving | None = None
        self._has_stepped = False

    def go(self, checkpoints: dict[Path, Path], stop: threading.Event) -> FleetOutcome:
        """Runs to the end of all jobs, or raises Interrupted after saving what there is."""
        with self._model:
            self._admit(checkpoints)
            if self._file.sweep is not None and self._file.sweep.successive_halving is not None:
                totals = {run.member.name: run.member.options.total_steps for run in self._runs}
                self._halving = Halving(self._file.sweep.successive_halving, self._file.configurations, totals)
            while self._runs:
                if stop.is_set():
                    raise Interrupted(self._save_all())
                self._step()
                self._admit(checkpoints)
        best = None
        if self._file.sweep is not None:
            ended = {name: loss for name, loss in self._last_evals.items() if name in self._results}
            best = best_of(ended, self._file.configurations)
        return FleetOutcome(self._results, self._failures, self._stopped, best)

    def _admit(self, checkpoints: dict[Path, Path]) -> None:
        while self._waiting and len(self._runs) < self._most:
            prepared = self._waiting.pop(0)
            progress = self._progress.of(_name(prepared.job))
            try:
                built = build_member(prepared, self._model, progress.warned)
                check_space(prepared.job, built.adapter.parameters.weights.numel(), built.member.options.total_steps)
            except JobInvalid as error:
                if not self._has_stepped:
                    raise
                # The others have hours of work behind them.
                self._failures[_name(prepared.job)] = str(error)
                self._progress.ended(_name(prepared.job), "refused")
                continue
            run = MemberRun(prepared, self._base, built, progress)
            run.begin(checkpoints.get(prepared.job.output))
            self._fleet.admit(built.member)
            if built.member.loss.needs_reference and prepared.job.loss.precompute_ref_log_probs:
                self._fleet.precompute_reference(built.member)
            self._runs.append(run)
            self._end_of(run)  # a checkpoint of the last step has nothing left to do

    def _step(self) -> None:
        reports = self._fleet.step()
        self._has_stepped = True
        stepped = [run for run in self._runs if run.member.name in reports]
        for run in stepped:
            run.stepped(reports[run.member.name])
        due = [run for run in stepped if run.is_eval_due or self._is_rung(run)]
        evals = self._fleet.evaluate([run.member for run in due]) if due else {}
        for run in due:
            run.evaluated(evals[run.member.name])
            self._last_evals[run.member.name] = evals[run.member.name].loss
        self._halve(stepped)
        for run in list(self._runs):
            if run.is_save_due and run in stepped:
                run.progress.saved(run.save())
            self._end_of(run)

    def _is_rung(self, run: MemberRun) -> bool:
        return self._halving is not None and run.member.state == "running" and self._halving.is_rung(run.member.step)

    def _halve(self, stepped: Sequence[MemberRun]) -> None:
        """Those that lose at a rung end here; nothing of them is exported."""
        at_rung = [run for run in stepped if self._is_rung(run)]
        if self._halving is None or not at_rung:
            return
        step = at_rung[0].member.step
        losses = {run.member.name: self._last_evals[run.member.name] for run in at_rung}
        losers = set(self._halving.losers(step, losses))
        for run in at_rung:
            if run.member.name in losers:
                run.member.state = "stopped"
                self._stopped[run.member.name] = f"step {step}: eval loss {losses[run.member.name]:.4f} was not enough"

    def _end_of(self, run: MemberRun) -> None:
        """Exports what is finished, saves what has diverged, and makes place."""
        member = run.member
        if member.state == "running":
            return
        if member.state == "finished":
            if refingerprint(self._base) != self._base.spec.fingerprint:
                raise BaseChanged("the frozen base was written to during training; nothing was exported")
            self._results[member.name] = run.finish()
            self._progress.ended(member.name, "finished")
        elif member.state == "stopped":
            run.discard()
            self._progress.ended(member.name, "stopped")
        else:
            if member.step:
                run.save()
            self._failures[member.name] = member.failure or member.state
            self._progress.ended(member.name, "diverged")
        self._fleet.release(member)
        self._runs.remove(run)

    def _save_all(self) -> Path | None:
        saved = [run.save() for run in self._runs if run.member.step]
        return saved[0] if saved else None


def _name(job: TrainConfig) -> str:
    return job.name or job.output.name


def _warn_of_lost_ends(prepared: JobData, progress: Progress) -> None:
    report = prepared.data.report
    if report.endless:
        progress.warned(
            f"{report.endless} of {report.train} training examples are truncated before the token that ends "
            "them and do not teach the adapter to stop; raise data.max_length, or drop them by data.truncation: drop"
        )

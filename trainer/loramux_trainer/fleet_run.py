"""Jobs in one fleet on one frozen base, from their data to their files: who takes part, who waits, who has ended.

The base is fingerprinted at load and again before anything is exported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loramux_adapters.base.load import BaseRefused, LoadedBase, refingerprint
from loramux_trainer.errors import (
    BaseChanged,
    CheckpointInvalid,
    Interrupted,
    JobInvalid,
    ModelInvalid,
    OutputFailed,
    TrainerError,
)
from loramux_trainer.finished import check_data, has_adapter, read_finished
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.fleet.torch_errors import NoDecomposition, is_out_of_memory
from loramux_trainer.halving import Best, Halving, best_of
from loramux_trainer.halving_record import record_of
from loramux_trainer.job import TrainConfig
from loramux_trainer.job_file import JobFile
from loramux_trainer.least_memory import check_memory
from loramux_trainer.member_run import MemberRun, TrainResult, discard_checkpoints, finished_result, writing
from loramux_trainer.members import build_member
from loramux_trainer.optimizers.devices import check_device
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
from loramux_trainer.progress import FleetProgress, Progress
from loramux_trainer.space import check_space


@dataclass(frozen=True)
class FleetOutcome:
    """What became of each job, by name: a result, or why there is none.

    `failures`: of jobs that diverged, whose output could not be written, or that could not begin beside others that
    were under way.
    """

    results: dict[str, TrainResult]
    failures: dict[str, str]
    stopped: dict[str, str] = field(default_factory=dict)  # by successive halving
    best: Best | None = None  # of a sweep


class FleetRun:
    """The base, the jobs that take part, and those that wait. `writes`: else they are only watched, and neither an
    adapter nor a checkpoint comes of them.
    """

    def __init__(
        self,
        file: JobFile,
        progress: FleetProgress,
        *,
        read: Callable[[TrainConfig], JobData] = read_job_data,
        writes: bool = True,
    ) -> None:
        jobs, first = file.jobs, file.jobs[0]
        self._file, self._progress, self._read, self._writes = file, progress, read, writes
        self._most = file.fleet.max_members or len(jobs)
        device = find_device(first)
        for job in jobs:
            check_device(job.training.optimizer, device.type)
        self._runs: list[MemberRun] = []
        self._results: dict[str, TrainResult] = {}
        self._failures: dict[str, str] = {}
        self._halving: Halving | None = None
        self._has_stepped = False
        self._record = record_of(file)
        self._record.read()
        self._stopped: dict[str, str] = {}
        self._waiting: list[JobData] = []
        for job in jobs:
            try:
                self._prepare(job)
            except TrainerError as error:
                _name_job(error, job, file)
                raise
        if self._waiting:
            self._open(device)

    def _open(self, device: torch.device) -> None:
        """Loads the base that they wait for."""
        jobs, first = [prepared.job for prepared in self._waiting], self._file.jobs[0]
        dtype, products = compute_dtype(first, device), frozen_products(first, device)
        check_memory(jobs[: self._most], self._waiting[0].reading.outline, device, dtype)
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
        self._fleet = Fleet(self._model, token_budget=self._file.fleet.token_budget, warn=self._progress.warned)
        for name, result in self._results.items():
            if result.base_fingerprint != self._base.spec.fingerprint:
                raise JobInvalid("output", f"{result.output} has the adapter of another base ({name}); choose another")

    def _prepare(self, job: TrainConfig) -> None:
        """Reads its data, unless a run before this one brought it to its end."""
        name = job.run_name
        if name in self._record.stopped:
            discard_checkpoints(job.output)
            self._stopped[name] = self._record.stopped[name]
            self._progress.ended(name, "stopped")
            return
        prepared = self._read(job)
        if not has_adapter(job.output):
            _warn_of_lost_ends(prepared, self._progress.of(name))
            self._waiting.append(prepared)
            return
        report = read_finished(job)
        check_data(job, report, prepared.data.digest)
        self._results[name] = finished_result(job.output, report)
        self._progress.of(name).warned(f"{job.output} was finished before: nothing of it is trained again")
        self._progress.ended(name, "finished")

    def go(self, checkpoints: dict[Path, Path], stop: threading.Event) -> FleetOutcome:
        """Runs to the end of all jobs, or raises Interrupted after saving what there is."""
        if self._waiting:
            self._train(checkpoints, stop)
        best = None
        if self._file.sweep is not None:
            ended = {name: each.eval_loss for name, each in self._results.items() if each.eval_loss is not None}
            if (key := self._file.incomparable_by) is None:
                best = best_of(ended, self._file.configurations)
            elif ended:
                self._progress.warned(f"no best is named: eval losses mean another thing with another {key}")
        return FleetOutcome(self._results, self._failures, self._stopped, best)

    def _train(self, checkpoints: dict[Path, Path], stop: threading.Event) -> None:
        with self._model:
            self._admit(checkpoints)
            if self._file.sweep is not None and self._file.sweep.successive_halving is not None:
                totals = {run.member.name: run.member.options.total_steps for run in self._runs}
                self._halving = Halving(
                    self._file.sweep.successive_halving, self._file.configurations, totals, self._record
                )
                self._halve()
                self._end_all()
            while self._runs:
                if stop.is_set():
                    raise Interrupted(self._save_all())
                self._step()
                self._admit(checkpoints)

    def _admit(self, checkpoints: dict[Path, Path]) -> None:
        while self._waiting and len(self._runs) < self._most:
            prepared = self._waiting.pop(0)
            try:
                run = self._begin(prepared, checkpoints.get(prepared.job.output))
            except Exception as error:
                is_known = isinstance(error, (JobInvalid, CheckpointInvalid, NoDecomposition))
                if not self._has_stepped or not (is_known or is_out_of_memory(error)):
                    _name_job(error, prepared.job, self._file)
                    raise
                # The others have hours of work behind them.
                full = "the device has too little memory for it beside the others; run again with --resume"
                self._failures[prepared.job.run_name] = full if is_out_of_memory(error) else str(error)
                self._progress.ended(prepared.job.run_name, "refused")
                continue
            self._runs.append(run)
            self._end_of(run)  # a checkpoint of the last step has nothing left to do

    def _begin(self, prepared: JobData, checkpoint: Path | None) -> MemberRun:
        job, progress = prepared.job, self._progress.of(prepared.job.run_name)
        built = build_member(prepared, self._model, progress.warned)
        if self._writes:
            parameters = built.adapter.parameters.weights.numel()
            beside = {run.job.output: run.bytes_to_write for run in self._runs}
            check_space(job, parameters, built.member.options.total_steps, beside)
        run = MemberRun(prepared, self._model, built, progress)
        run.begin(checkpoint)
        if built.member.loss.needs_reference and job.loss.precompute_ref_log_probs:
            self._fleet.precompute_reference(built.member)
        self._fleet.admit(built.member)
        return run

    def _step(self) -> None:
        reports = self._fleet.step()
        self._has_stepped = True
        stepped = [run for run in self._runs if run.member.name in reports]
        for run in stepped:
            run.stepped(reports[run.member.name])
        self._evaluate([run for run in stepped if run.is_eval_due or self._is_rung(run)])
        self._halve()
        for run in stepped:
            if run.is_save_due:
                self._keep(run)
        self._end_all()

    def _evaluate(self, due: Sequence[MemberRun]) -> None:
        evals = self._fleet.evaluate([run.member for run in due]) if due else {}
        for run in due:
            if run.member.name in evals:  # else it has diverged
                run.evaluated(evals[run.member.name])

    def _keep(self, run: MemberRun) -> None:
        try:
            run.progress.saved(run.save())
        except OutputFailed as error:
            self._set_aside(run, error)

    def _is_rung(self, run: MemberRun) -> bool:
        return self._halving is not None and run.member.state == "running" and self._halving.is_rung(run.member.step)

    def _halve(self) -> None:
        """Who reaches a rung waits for the others; once all are there, those that lose end: nothing is exported."""
        if self._halving is None:
            return
        for run in self._runs:
            if self._is_rung(run):
                run.member.state = "waiting"
        waiting = [run for run in self._runs if run.member.state == "waiting"]
        if not waiting or any(run.member.state == "running" for run in self._runs):
            return
        step = min(run.member.step for run in waiting)
        there = [run for run in waiting if run.member.step == step]
        self._evaluate([run for run in there if run.eval_loss_at(step) is None])
        losses = {run.member.name: run.eval_loss_at(step) for run in there}
        with writing(self._file.jobs[0].output.parent):
            known = {name: loss for name, loss in losses.items() if loss is not None}
            losers = self._halving.decide(step, known)
        self._stopped |= losers
        for run in there:
            if run.member.state == "waiting":
                run.member.state = "stopped" if run.member.name in losers else "running"

    def _end_all(self) -> None:
        for run in list(self._runs):
            self._end_of(run)

    def _end_of(self, run: MemberRun) -> None:
        """Exports what is finished, saves what has diverged, and makes place."""
        member = run.member
        if member.state in ("running", "waiting"):
            return
        try:
            self._conclude(run)
        except OutputFailed as error:
            self._set_aside(run, error)
            return
        self._progress.ended(member.name, member.state)
        self._fleet.release(member)
        self._runs.remove(run)

    def _conclude(self, run: MemberRun) -> None:
        member = run.member
        if member.state == "finished":
            if refingerprint(self._base) != self._base.spec.fingerprint:
                raise BaseChanged("the frozen base was written to during training; nothing was exported")
            if self._writes:
                run.load_best()
                self._results[member.name] = run.finish()
        elif member.state == "stopped":
            run.discard()
        else:
            self._failures[member.name] = member.failure or member.state
            if self._writes and member.step and not member.is_torn:
                run.save()

    def _set_aside(self, run: MemberRun, error: OutputFailed) -> None:
        """Its disk is no reason to end the others; raises the error where it is alone in its file."""
        if len(self._file.jobs) == 1:
            raise error
        self._failures.setdefault(run.member.name, str(error))
        self._progress.ended(run.member.name, "failed")
        self._fleet.release(run.member)
        self._runs.remove(run)

    def _save_all(self) -> list[Path]:
        """All that can be saved, then raises OutputFailed for the first that could not."""
        saved: list[Path] = []
        failed: list[OutputFailed] = []
        for run in self._runs:
            if run.member.step:
                try:
                    saved.append(run.save())
                except OutputFailed as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return saved


def _name_job(error: Exception, job: TrainConfig, file: JobFile) -> None:
    """Says of which job a mistake is, in a file of several."""
    if isinstance(error, TrainerError) and len(file.jobs) > 1:
        error.args = (f"job {job.run_name}: {error}",)


def _warn_of_lost_ends(prepared: JobData, progress: Progress) -> None:
    report = prepared.data.report
    if report.endless:
        progress.warned(
            f"{report.endless} of {report.train} training examples are truncated before the token that ends "
            "them and do not teach the adapter to stop; raise data.max_length, or drop them by data.truncation: drop"
        )

"""One job of a run: its member in the fleet, its history, checkpoints and export.

Knows how one job begins, goes on and ends; nothing of other jobs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from loramux_adapters.errors import AdapterError
from loramux_adapters.memory import peak_bytes
from loramux_adapters.weights import AdapterWeights
from loramux_trainer.advice import warnings_before
from loramux_trainer.certify import Certified, certify, fleet_logits, questions
from loramux_trainer.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from loramux_trainer.data.dataset import DataReport
from loramux_trainer.errors import CheckpointInvalid, JobInvalid, OutputFailed
from loramux_trainer.export import export
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.fleet.torch_errors import NoDecomposition
from loramux_trainer.guard import best_of_evals, is_patience_over, worse_epochs
from loramux_trainer.job import renamed_identity
from loramux_trainer.members import BuiltMember
from loramux_trainer.preparation import JobData
from loramux_trainer.progress import EvalReport, Progress, StepReport
from loramux_trainer.space import still_needed

_ARITHMETIC = "fleet"
"""What steps are computed by; a checkpoint of another arithmetic does not go on."""


_BEST = "best."
"""Begins the names of a checkpoint's tensors of the best evaluation so far."""


@dataclass(frozen=True)
class TrainResult:
    """What came out. `output` is a directory that `adapters push` takes; `loss` is the mean of the last ten steps,
    `eval_loss` that of what is exported.
    """

    output: Path
    base_fingerprint: str
    steps: int
    loss: float
    eval_loss: float | None
    supervised_tokens: int
    seconds: float
    data: DataReport


class MemberRun:
    """A job's member with its bookkeeping. `seconds` are those in which it took part."""

    def __init__(self, prepared: JobData, model: FleetModel, built: BuiltMember, progress: Progress) -> None:
        self.job, self.member, self.progress = prepared.job, built.member, progress
        self._data, self._base, self._built = prepared.data, model.base, built
        self._model, self._reading = model, prepared.reading
        self.steps: list[StepReport] = []
        self.evals: list[EvalReport] = []
        self._best: dict[str, torch.Tensor] = {}  # of the evaluation with the lowest loss, where the job wants it
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def begin(self, checkpoint: Path | None) -> None:
        """Takes over a checkpoint's state. Raises CheckpointInvalid when it is of another job, data or base."""
        if checkpoint is not None:
            self._resume(read_checkpoint(checkpoint))
        else:
            for warning in self._warnings():
                self.progress.warned(warning)
        self.progress.started(self.member.options.total_steps, self.member.step, self._data.report)
        self._started = time.monotonic()

    def _resume(self, checkpoint: Checkpoint) -> None:
        identity = checkpoint.meta.get("identity")
        if not isinstance(identity, dict):
            raise CheckpointInvalid("cannot resume: the checkpoint was made by another version of Loramux")
        identity = {"arithmetic": None, **renamed_identity(identity)}
        for key, value in self._identity().items():
            if key not in identity or identity[key] != value:
                values = f": {identity.get(key)}, not {value}" if "." in key else ""
                raise CheckpointInvalid(f"cannot resume: the checkpoint was made with another {key}{values}")
        if checkpoint.meta.get("versions") != _versions():
            made, now = _named(checkpoint.meta.get("versions") or {}), _named(_versions())
            self.progress.warned(
                f"the checkpoint was made with {made}, this run continues with {now}: its bits may not be those "
                "of a run that was never stopped"
            )
        self.member.restore(checkpoint.step, checkpoint.tensors)
        self._best = {
            name.removeprefix(_BEST): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(_BEST)
        }
        self.steps = [StepReport(**values) for values in checkpoint.meta["history"]]
        self.evals = [EvalReport(**values) for values in checkpoint.meta["evals"]]
        self._seconds_before = float(checkpoint.meta["seconds"])
        self._stop_early()

    def stepped(self, report: StepReport) -> None:
        """A step was taken."""
        self.steps.append(report)
        self.progress.stepped(report)

    def evaluated(self, report: EvalReport) -> None:
        """It was evaluated after its last step."""
        known = self._worse_epochs()
        self.evals.append(report)
        self.progress.evaluated(report)
        for notice in self._worse_epochs()[len(known) :]:
            self.progress.warned(notice)
        if self.job.training.load_best_model_at_end and best_of_evals(self.evals) is report:
            self._best = self.member.adapter_tensors()
        self._stop_early()

    def _stop_early(self) -> None:
        patience, threshold = self.job.training.early_stopping_patience, self.job.training.early_stopping_threshold
        if patience is None or self.member.state != "running":
            return
        if is_patience_over(self.evals, patience, threshold):
            self.member.state = "finished"

    def load_best(self) -> None:
        """Of a job that is finished: takes back the weights of its best evaluation, where it wants them exported."""
        if self._best:
            self.member.take_adapter(self._best)

    @property
    def is_eval_due(self) -> bool:
        """After the step that was taken."""
        step, total = self.member.step, self.member.options.total_steps
        return bool(self._data.eval) and (step % self._built.eval_every == 0 or step == total)

    @property
    def is_save_due(self) -> bool:
        """After the step that was taken; the end saves by itself."""
        every = self.job.checkpoint.save_steps
        return bool(every) and self.member.step % every == 0 and self.member.state in ("running", "waiting")

    @property
    def bytes_to_write(self) -> int:
        """What it still writes at most, besides what is on the disk already."""
        return still_needed(self.job, self.member.adapter.parameters.weights.numel(), self.member.options.total_steps)

    def save(self, *, keep: int | None = None) -> Path:
        """Writes the whole state. Raises OutputFailed."""
        meta = {
            "identity": self._identity(),
            "history": [asdict(step) for step in self.steps],
            "evals": [asdict(report) for report in self.evals],
            "seconds": self._seconds(),
            "versions": _versions(),
        }
        best = {_BEST + name: tensor for name, tensor in self._best.items()}
        checkpoint = Checkpoint(self.member.step, self.member.tensors() | best, meta)
        with writing(self.job.output):
            root = self.job.output / CHECKPOINTS
            return write_checkpoint(root, checkpoint, keep=keep or self.job.checkpoint.save_total_limit)

    def finish(self) -> TrainResult:
        """Exports the adapter. What is about to be exported is saved before, so that a failing export loses nothing."""
        result = self._result()
        saved = self.save(keep=self.job.checkpoint.save_total_limit + 1)
        try:
            with writing(self.job.output):
                adapter = self._built.adapter
                export(self.job.output, adapter, self._base.spec, self._certify, partial(self._report, result))
        except (AdapterError, NoDecomposition) as error:
            raise OutputFailed(f"{self.job.output}: what was trained makes no adapter: {error}") from error
        remove_checkpoint(saved)
        return result

    def eval_loss_at(self, step: int) -> float | None:
        """Of the evaluation after this step; None where there was none."""
        return next((report.loss for report in reversed(self.evals) if report.step == step), None)

    def discard(self) -> None:
        """Of a run that ends without an adapter: its checkpoints, and its output where nothing else is in it."""
        discard_checkpoints(self.job.output)

    def _result(self) -> TrainResult:
        last, exported = self.steps[-10:], self._exported()
        return TrainResult(
            output=self.job.output,
            base_fingerprint=self._base.spec.fingerprint,
            steps=self.member.step,
            loss=sum(step.loss for step in last) / len(last),
            eval_loss=None if exported is None else exported.loss,
            supervised_tokens=sum(step.tokens for step in self.steps),
            seconds=self._seconds(),
            data=self._data.report,
        )

    def _exported(self) -> EvalReport | None:
        """The evaluation of what is exported."""
        if self._best:
            return best_of_evals(self.evals)
        return self.evals[-1] if self.evals else None

    def _warnings(self) -> list[str]:
        steps, parameters = self.member.options.total_steps, self.member.adapter.parameters.weights.numel()
        return list(warnings_before(self.job, self._data.report, steps / self._built.steps_per_epoch, parameters))

    def _worse_epochs(self) -> list[str]:
        return worse_epochs(self.evals, self._built.steps_per_epoch)

    def _certify(self, exported: AdapterWeights) -> Certified:
        adapter = self._built.adapter
        asked = questions(exported.spec, self._base.spec, self._reading)
        trained = fleet_logits(self._model, adapter.parts(with_gradients=False), asked, exported.spec.virtual_tokens)
        certified = certify(self._model, asked, exported, trained)
        allowed = certified.certificate.tolerance_on(certified.certificate.computed.compute_dtype)
        if adapter.exports_exactly and not certified.difference <= allowed:
            raise OutputFailed(
                f"{self.job.output}: the export computes other logits than what was trained, "
                f"{certified.difference:.2g} of their deviation; nothing was exported, the checkpoint stays"
            )
        return certified

    def _report(self, result: TrainResult, certified: Certified) -> str:
        """JSON that says how the adapter was made."""
        return json.dumps(self._values(result, certified), indent=2)

    def _values(self, result: TrainResult, certified: Certified) -> dict[str, Any]:
        exported = self._exported()
        return {
            "adapter": certified.certificate.adapter,
            "export_difference": certified.difference,
            "job": self.job.to_dict(),
            "result": {key: value for key, value in asdict(result).items() if key not in ("output", "data")},
            "data": asdict(self._data.report),
            "exported_step": exported.step if exported is not None and self._best else self.member.step,
            "stopped_early": self.member.step < self.member.options.total_steps,
            "warnings": [*self._warnings(), *self._worse_epochs()],
            "peak_bytes": peak_bytes(self._base.device),
            "evals": [asdict(report) for report in self.evals],
            "history": [asdict(report) for report in self.steps],
            "versions": _versions(),
            "training_data": self._data.digest,
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same to continue bit for bit, with what `auto` has become on this machine."""
        return {
            **self.job.reproducibility_key(),
            "training.device": self._base.device.type,
            "training.compute_dtype": str(self._base.compute_dtype).removeprefix("torch."),
            "training data": self._data.digest,
            **({"evaluation data": self._data.eval_digest} if self.job.training.is_guarded else {}),
            "base": self._base.spec.fingerprint,
            "arithmetic": _ARITHMETIC,
        }

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def discard_checkpoints(output: Path) -> None:
    """All of them, and the output where nothing else is in it."""
    for checkpoint in list_checkpoints(output / CHECKPOINTS):
        remove_checkpoint(checkpoint)
    with suppress(OSError):  # not empty, or not there
        output.rmdir()


def finished_result(output: Path, report: Mapping[str, Any]) -> TrainResult:
    """What came out of a run before this one, by its report. Raises JobInvalid where that is not one of ours."""
    try:
        return TrainResult(output=output, data=DataReport(**report["data"]), **report["result"])
    except TypeError:
        raise JobInvalid("output", f"{output} has an adapter of another version; choose another directory") from None


@contextmanager
def output_directory(output: Path) -> Iterator[None]:
    """Make it before any work, so that a long run cannot fail on it at its end; what stays empty goes."""
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobInvalid("output", f"{output} cannot be made: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty: a checkpoint is in it
                output.rmdir()
        raise


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns what a full or broken disk raises into OutputFailed, with the way on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        saved = list_checkpoints(output / CHECKPOINTS)
        remedy = f"; free some space and run again with --resume, which continues from {saved[-1]}" if saved else ""
        raise OutputFailed(f"{output} cannot be written any more: {reason}{remedy}") from error


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"

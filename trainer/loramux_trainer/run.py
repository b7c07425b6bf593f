"""A job from beginning to end: base, data, adapter, loop, checkpoints, export. The trainer's entry point.

The base is fingerprinted at load and again before anything is exported.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.modeling_layers import GradientCheckpointingLayer

from loramux_adapters.apply.trainable import attach
from loramux_adapters.base.load import BaseRefused, LoadedBase, load_base, quantized_modules, refingerprint
from loramux_adapters.device import DeviceRefused, best_dtype, check_dtype, select_device
from loramux_adapters.embedded.tiny import TINY_NAME, tiny_path
from loramux_adapters.guard.examine import examine
from loramux_adapters.guard.rope import RopeChoice
from loramux_trainer.base_reading import loading, read_base
from loramux_trainer.checkpoints import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from loramux_trainer.data import DataReport, DataSet, check_context, load_data
from loramux_trainer.errors import (
    BaseChanged,
    CheckpointInvalid,
    DeviceFull,
    DeviceInvalid,
    Interrupted,
    JobInvalid,
    ModelInvalid,
    OutputFailed,
    Problems,
)
from loramux_trainer.export import export_peft
from loramux_trainer.job import TrainConfig, renamed_identity
from loramux_trainer.loop import Loop
from loramux_trainer.preflight import check_job
from loramux_trainer.progress import EvalReport, Progress, Silent, StepReport
from loramux_trainer.space import check_space
from loramux_trainer.targets import resolve_targets


@dataclass(frozen=True)
class TrainResult:
    """What came out. `output` is a PEFT directory; `loss` is the mean of the last ten steps."""

    output: Path
    base_fingerprint: str
    steps: int
    loss: float
    eval_loss: float | None
    supervised_tokens: int
    seconds: float
    data: DataReport


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
    check_job(job, resume=resume)
    saved = list_checkpoints(job.output / CHECKPOINTS)
    try:
        with _output_directory(job.output):
            return _train(job, saved[-1] if saved else None, progress or Silent(), stop or threading.Event())
    except torch.OutOfMemoryError as error:
        raise DeviceFull(
            "the device has too little memory for this job; lower training.batch_size (and raise "
            "training.gradient_accumulation_steps for the same steps) or data.max_length, or set "
            "training.gradient_checkpointing"
        ) from error


def _train(job: TrainConfig, checkpoint: Path | None, progress: Progress, stop: threading.Event) -> TrainResult:
    device = _device(job)
    dtype = _compute_dtype(job, device)
    tokenizer, data = _read_data(job)
    _warn_of_lost_ends(data, progress)
    base = _load(job, device, dtype)
    rope = _examine(job, base)
    names = resolve_targets(job.lora.target_modules, base.spec)
    if job.training.gradient_checkpointing:
        enable_activation_checkpointing(base.model)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        attach(
            base,
            dict.fromkeys(names, job.lora.rank),
            scales=dict.fromkeys(names, job.scale),
            dropout=job.lora.dropout,
            seed=job.training.seed,
        ) as adapter,
    ):
        torch.manual_seed(job.training.seed)
        loop = Loop(base.model, adapter, data, job.training, pad_id=_pad_id(base, tokenizer), device=device, rope=rope)
        check_space(job, sum(parameter.numel() for parameter in adapter.parameters()), loop.total_steps)
        run = _Run(job, base, data, loop, progress)
        if checkpoint is not None:
            run.resume(read_checkpoint(checkpoint))
        result = run.go(stop)
        if refingerprint(base) != base.spec.fingerprint:
            raise BaseChanged("the frozen base was written to during training; nothing was exported")
        saved = run.save_before_export()
        with _writing(job.output):
            export_peft(job, base.spec, adapter.state(), json.dumps(run.report(result), indent=2))
        remove_checkpoint(saved)
    return result


class _Run:
    """The loop with its bookkeeping: evaluation, checkpoints, history."""

    def __init__(self, job: TrainConfig, base: LoadedBase, data: DataSet, loop: Loop, progress: Progress) -> None:
        self._job, self._base, self._data, self._loop, self._progress = job, base, data, loop, progress
        self._steps: list[StepReport] = []
        self._evals: list[EvalReport] = []
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state. Raises CheckpointInvalid when it is not of this job, data or base."""
        identity = checkpoint.meta.get("identity")
        if not isinstance(identity, dict):
            raise CheckpointInvalid("cannot resume: the checkpoint was made by another version of Loramux")
        identity = renamed_identity(identity)
        for key, value in self._identity().items():
            if key not in identity or identity[key] != value:
                values = f": {identity.get(key)}, not {value}" if "." in key else ""
                raise CheckpointInvalid(f"cannot resume: the checkpoint was made with another {key}{values}")
        if checkpoint.meta.get("versions") != _versions():
            made, now = _named(checkpoint.meta.get("versions") or {}), _named(_versions())
            self._progress.warned(
                f"the checkpoint was made with {made}, this run continues with {now}: its bits may not be those "
                "of a run that was never stopped"
            )
        self._loop.restore(checkpoint.step, checkpoint.tensors)
        self._steps = [StepReport(**values) for values in checkpoint.meta["history"]]
        self._evals = [EvalReport(**values) for values in checkpoint.meta["evals"]]
        self._seconds_before = float(checkpoint.meta["seconds"])

    def go(self, stop: threading.Event) -> TrainResult:
        """Run to the end, or raise Interrupted after saving what there is."""
        loop, every = self._loop, self._job.checkpoint.save_steps
        self._progress.started(loop.total_steps, loop.step, self._data.report)
        while loop.step < loop.total_steps:
            if stop.is_set():
                raise Interrupted(self._save() if loop.step else None)
            self._steps.append(loop.train_step())
            self._progress.stepped(self._steps[-1])
            if self._data.eval and (loop.step % loop.eval_every == 0 or loop.step == loop.total_steps):
                self._evals.append(loop.evaluate())
                self._progress.evaluated(self._evals[-1])
            if every and loop.step % every == 0 and loop.step < loop.total_steps:
                self._progress.saved(self._save())
        last = self._steps[-10:]
        return TrainResult(
            output=self._job.output,
            base_fingerprint=self._base.spec.fingerprint,
            steps=loop.step,
            loss=sum(step.loss for step in last) / len(last),
            eval_loss=self._evals[-1].loss if self._evals else None,
            supervised_tokens=sum(step.tokens for step in self._steps),
            seconds=self._seconds(),
            data=self._data.report,
        )

    def report(self, result: TrainResult) -> dict[str, Any]:
        """JSON values that say how the adapter was made."""
        return {
            "job": self._job.to_dict(),
            "result": {key: value for key, value in asdict(result).items() if key not in ("output", "data")},
            "data": asdict(self._data.report),
            "evals": [asdict(report) for report in self._evals],
            "history": [asdict(report) for report in self._steps],
            "versions": _versions(),
        }

    def save_before_export(self) -> Path:
        """Save the state that is about to be exported, beside what is kept, so that a failing export loses nothing."""
        return self._save(keep=self._job.checkpoint.save_total_limit + 1)

    def _save(self, *, keep: int | None = None) -> Path:
        meta = {
            "identity": self._identity(),
            "history": [asdict(step) for step in self._steps],
            "evals": [asdict(report) for report in self._evals],
            "seconds": self._seconds(),
            "versions": _versions(),
        }
        checkpoint = Checkpoint(self._loop.step, self._loop.tensors(), meta)
        with _writing(self._job.output):
            root = self._job.output / CHECKPOINTS
            return write_checkpoint(root, checkpoint, keep=keep or self._job.checkpoint.save_total_limit)

    def _identity(self) -> dict[str, Any]:
        """What must be the same to continue bit for bit, with what `auto` has become on this machine."""
        return {
            **self._job.reproducibility_key(),
            "training.device": self._base.device.type,
            "training.compute_dtype": str(self._base.compute_dtype).removeprefix("torch."),
            "training data": self._data.digest,
            "base": self._base.spec.fingerprint,
        }

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


@contextmanager
def _output_directory(output: Path) -> Iterator[None]:
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
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        saved = list_checkpoints(output / CHECKPOINTS)
        remedy = f"; free some space and run again with --resume, which continues from {saved[-1]}" if saved else ""
        raise OutputFailed(f"{output} cannot be written any more: {reason}{remedy}") from error


def _source(job: TrainConfig) -> str:
    return str(tiny_path()) if job.model == TINY_NAME else job.model


def _read_data(job: TrainConfig) -> tuple[Any, DataSet]:
    """The base's tokenizer and the data in its tokens; all that can be refused without the base's weights."""
    reading = read_base(job, _source(job))
    problems = Problems()
    with problems.collecting():
        resolve_targets(job.lora.target_modules, reading.outline)
    with problems.collecting():
        data = load_data(job.data, reading.encoder, seed=job.training.seed)
        longest = max(unit.longest for unit in (*data.train, *data.eval))
        check_context(longest, reading.outline.context_length)
    problems.raise_any()
    return reading.tokenizer, data


def _load(job: TrainConfig, device: torch.device, dtype: torch.dtype) -> LoadedBase:
    with loading(job):
        base = load_base(_source(job), compute_dtype=dtype, device=device)
    _refuse_split_blocks(job, base)
    return base


def _examine(job: TrainConfig, base: LoadedBase) -> RopeChoice | None:
    """What a server asks of its base before it serves: an adapter for a base that is refused could never be used.

    Over no more positions than training sees. Returns where rows choose their rotary factors, on bases that have some.
    """
    try:
        return examine(base, min(base.spec.context_length, job.data.max_length)).rope
    except BaseRefused as refusal:
        raise ModelInvalid(f"{refusal}; an adapter trained on it could not be served") from refusal


def _refuse_split_blocks(job: TrainConfig, base: LoadedBase) -> None:
    """bitsandbytes 0.50 on a CPU takes wrong scales where a block crosses a row: training would differ from serving."""
    if base.device.type != "cpu":
        return
    for name, module in quantized_modules(base.model):
        in_features = module.codes.shape[1] * 2
        if in_features % module.block_size:
            raise ModelInvalid(
                f"{name} of {job.model} has {in_features} inputs, no multiple of the {module.block_size} weights of an "
                "NF4 block, which bitsandbytes computes wrongly on a CPU; train it on a GPU, or another base",
            )


def _device(job: TrainConfig) -> torch.device:
    try:
        return select_device(job.training.device)
    except DeviceRefused as refusal:
        raise DeviceInvalid("training.device", str(refusal)) from refusal


def _compute_dtype(job: TrainConfig, device: torch.device) -> torch.dtype:
    if job.training.compute_dtype == "auto":
        return best_dtype(device) if device.type == "cuda" else torch.float32
    dtype = torch.bfloat16 if job.training.compute_dtype == "bfloat16" else torch.float32
    try:
        check_dtype(device, dtype)
    except DeviceRefused as refusal:
        raise DeviceInvalid("training.compute_dtype", str(refusal)) from refusal
    return dtype


def _pad_id(base: LoadedBase, tokenizer: Any) -> int:
    """Any id that the model has an embedding for: padding is masked. A tokenizer's own may be one too many."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None and i < base.spec.vocab_size)


def _warn_of_lost_ends(data: DataSet, progress: Progress) -> None:
    if data.report.endless:
        progress.warned(
            f"{data.report.endless} of {data.report.train} training examples are truncated before the token that ends "
            "them and do not teach the adapter to stop; raise data.max_length, or drop them by data.truncation: drop"
        )


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute each layer in the backward pass. Only the layers themselves are in training mode: no dropout."""
    # transformers 5 renames this method on its way.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise JobInvalid("training.gradient_checkpointing", str(error)) from error
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"

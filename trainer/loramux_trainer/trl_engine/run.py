"""One job by trl's trainer on our frozen NF4 base, from its data to its files.

The base is fingerprinted at load and again before anything is exported.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loramux_adapters.adapter_files import CERTIFICATE_FILE, CONFIG_FILE
from loramux_adapters.base.fingerprint import fingerprint
from loramux_adapters.base.load import LoadedBase, quantized_modules
from loramux_adapters.formats.registry import read
from loramux_adapters.guard.examine import Examined
from loramux_trainer.errors import BaseChanged, Interrupted, OutputFailed
from loramux_trainer.export import export_files
from loramux_trainer.finished import REPORT, check_data, has_adapter, read_finished
from loramux_trainer.job import TrainConfig
from loramux_trainer.member_run import TrainResult, finished_result, writing
from loramux_trainer.methods.layouts import LIMITS
from loramux_trainer.optimizers.devices import check_device
from loramux_trainer.preparation import compute_dtype, examine_base, find_device, load
from loramux_trainer.progress import Progress
from loramux_trainer.space import check_space
from loramux_trainer.trl_engine.adapter import PeftAdapter, changed, scoring_model
from loramux_trainer.trl_engine.certificate import certify_peft
from loramux_trainer.trl_engine.data import TrlData, read_data
from loramux_trainer.trl_engine.trainers import build_trainer
from loramux_trainer.trl_engine.watch import Watch


def train_by_trl(job: TrainConfig, *, progress: Progress, stop: threading.Event) -> TrainResult:
    """Trains the job from its beginning to its end. Raises the errors of loramux_trainer.errors."""
    device = find_device(job)
    check_device(job.training.optimizer, device.type)
    data = read_data(job)
    if has_adapter(job.output):
        report = read_finished(job)
        check_data(job, report, data.digest)
        progress.warned(f"{job.output} was finished before: nothing of it is trained again")
        return finished_result(job.output, report)
    if job.loss.name == "reward":
        progress.warned("a reward adapter scores texts and generates none: PEFT loads it, and no server takes it")
    dtype = compute_dtype(job, device)
    base = load(job, device, dtype)
    return _Run(job, base, examine_base(base, data.longest), data, progress).go(stop)


def _fingerprint(base: LoadedBase) -> str:
    """Of the NF4 content as it is now, with PEFT's layers around the modules."""
    modules = ((name.removesuffix(".base_layer"), content) for name, content in quantized_modules(base.model))
    return fingerprint(modules, base.spec.parameters, base.config_json)


class _Run:
    def __init__(
        self, job: TrainConfig, base: LoadedBase, examined: Examined, data: TrlData, progress: Progress
    ) -> None:
        self._job, self._base, self._examined, self._data, self._progress = job, base, examined, data, progress
        self._adapter = PeftAdapter(job, base, data, progress)

    def go(self, stop: threading.Event) -> TrainResult:
        job, base = self._job, self._base
        model = scoring_model(base, job.training.seed) if job.loss.name == "reward" else base.model
        trainer = build_trainer(job, self._data, model, self._adapter.peft_config(), base.device.type)
        self._adapter.begin(trainer.model)
        before = self._adapter.tensors(trainer.model)
        watch = Watch(self._progress, self._data.report, stop, self._tokens)
        trainer.add_callback(watch)
        check_space(job, self._adapter.parameters, max(job.training.max_steps or 1, 1))
        if stop.is_set():
            raise Interrupted(())
        started = time.monotonic()
        with writing(job.output):
            trainer.train()
        if watch.was_stopped:
            raise Interrupted((), "stopped; a run of engine: trl keeps nothing on its way, it begins anew")
        tensors = self._adapter.tensors(trainer.model)
        if _fingerprint(base) != base.spec.fingerprint:
            raise BaseChanged("the frozen base was written to during training; nothing was exported")
        if not changed(before, tensors):
            raise OutputFailed(f"{job.output}: training changed nothing of the adapter, nothing was exported")
        result = self._result(watch, time.monotonic() - started)
        with writing(job.output):
            export_files(
                job.output,
                self._adapter.weights_file,
                self._adapter.config,
                tensors,
                base.spec,
                partial(self._describe, trainer.model, self._report(result, watch)),
            )
        return result

    def _describe(self, model: Any, report: dict[str, Any], files: Path) -> Mapping[str, bytes]:
        """What a server is to take is read as it reads it, and certified."""
        if self._job.loss.name == "reward":
            return {REPORT: _as_json(report)}
        names = (self._adapter.weights_file, CONFIG_FILE)
        exported = read({name: files / name for name in names}, self._base.spec, LIMITS)
        certified = certify_peft(model, self._base, self._examined, exported, self._data.reading)
        report = {"adapter": exported.spec.digest, "export_difference": certified.difference, **report}
        return {CERTIFICATE_FILE: certified.certificate.to_json(), REPORT: _as_json(report)}

    def _tokens(self, step: int, metrics: dict[str, float]) -> int:
        """With a loss, in 0-based `step`."""
        if self._data.supervised is None or self._data.order is None:
            training = self._job.training
            answers = training.batch_size * training.gradient_accumulation_steps
            return round(metrics.get("completions/mean_length", 0.0) * answers)
        return sum(self._data.supervised[index] for index in self._data.order.rows_of(step))

    def _result(self, watch: Watch, seconds: float) -> TrainResult:
        last = watch.steps[-10:]
        return TrainResult(
            output=self._job.output,
            base_fingerprint=self._base.spec.fingerprint,
            steps=watch.steps[-1].step,
            loss=sum(step.loss for step in last) / len(last),
            eval_loss=watch.evals[-1].loss if watch.evals else None,
            supervised_tokens=sum(step.tokens for step in watch.steps),
            seconds=seconds,
            data=self._data.report,
        )

    def _report(self, result: TrainResult, watch: Watch) -> dict[str, Any]:
        return {
            "job": self._job.to_dict(),
            "result": {key: value for key, value in asdict(result).items() if key not in ("output", "data")},
            "data": asdict(self._data.report),
            "evals": [asdict(report) for report in watch.evals],
            "history": [asdict(report) for report in watch.steps],
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
            "training_data": self._data.digest,
        }


def _as_json(report: Mapping[str, Any]) -> bytes:
    return json.dumps(report, indent=2).encode()

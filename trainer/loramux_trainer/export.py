"""A trained adapter as a PEFT directory that any PEFT program loads, declaring the base it belongs to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.formats.peft.writer import TrainedModule, write_peft
from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.checkpoints import TEMPORARY, move_durably
from loramux_trainer.job import TrainConfig

REPORT = "train_report.json"


def export_peft(
    job: TrainConfig, base: BaseModelSpec, state: Mapping[str, tuple[torch.Tensor, torch.Tensor]], report: str
) -> None:
    """Write the adapter and the report into `job.output`.

    All files are complete beside their places before the first one takes its own, on the same disk: a full one leaves
    nothing. The config comes last, so that a torn export is not taken for an adapter.
    """
    modules = {name: TrainedModule(a, b, job.lora.alpha) for name, (a, b) in state.items()}
    with tempfile.TemporaryDirectory(dir=job.output, prefix=TEMPORARY) as scratch:
        write_peft(Path(scratch), modules, base, use_rslora=job.lora.use_rslora)
        (Path(scratch) / REPORT).write_text(report, encoding="utf-8")
        for name in (WEIGHTS_FILE, REPORT, CONFIG_FILE):
            move_durably(Path(scratch) / name, job.output / name)

"""A trained adapter as a PEFT directory that any PEFT program loads, declaring the base it belongs to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from lorica_adapters.formats.peft_config import CONFIG_FILE
from lorica_adapters.formats.peft_tensors import WEIGHTS_FILE
from lorica_adapters.formats.peft_writer import TrainedModule, write_peft
from lorica_adapters.spec import BaseModelSpec
from lorica_trainer.checkpoints import replace_durably
from lorica_trainer.job import TrainJob


def export_peft(job: TrainJob, base: BaseModelSpec, state: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write the adapter into `job.output`; the config comes last, so that a torn export is no adapter."""
    modules = {name: TrainedModule(a, b, job.lora.alpha) for name, (a, b) in state.items()}
    with tempfile.TemporaryDirectory() as scratch:
        write_peft(Path(scratch), modules, base, use_rslora=job.lora.rslora)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            replace_durably(job.output / name, (Path(scratch) / name).read_bytes())

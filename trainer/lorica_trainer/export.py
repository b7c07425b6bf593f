"""A trained adapter as a PEFT directory that any PEFT program loads, declaring the base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save

from lorica_adapters.spec import BaseModelSpec
from lorica_trainer.checkpoints import replace_durably
from lorica_trainer.job import TrainJob

FINGERPRINT_KEY = "lorica_base_fingerprint"


def export_peft(job: TrainJob, base: BaseModelSpec, state: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write `job.output`; the config comes last, so that a torn export is no adapter."""
    tensors = {}
    for name, (a, b) in state.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    metadata = {"format": "pt", FINGERPRINT_KEY: base.fingerprint}
    replace_durably(job.output / "adapter_model.safetensors", save(tensors, metadata))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.model,
        "inference_mode": True,
        "r": job.lora.rank,
        "lora_alpha": job.lora.alpha,
        "lora_dropout": job.lora.dropout,
        "use_rslora": job.lora.rslora,
        "bias": "none",
        "fan_in_fan_out": all(base.modules[name].kind == "conv1d" for name in state),
        "target_modules": _shortest_targets(set(state), base),
    }
    replace_durably(job.output / "adapter_config.json", json.dumps(config, indent=2).encode())


def _shortest_targets(names: set[str], base: BaseModelSpec) -> list[str]:
    """The last name parts when they choose exactly `names` in this base, else the whole names."""
    suffixes = {name.rpartition(".")[2] for name in names}
    chosen = {name for name in base.modules if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if chosen == names else names)

"""Adapters that took their initial values from the base, as PEFT converts them and with their initial pair beside."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model

from loramux_adapters.adapter_files import INITIAL_FILE, WEIGHTS_FILE
from support.adapters import peft_warnings_ignored, save
from support.kinds import pristine_model


def make_initial_pair(checkpoint: Path, root: Path, method: str, *, seed: int = 0, **options: Any) -> dict[str, Path]:
    """One adapter twice, as "<method>-converted" and "<method>-pair"; `options` are LoraConfig's."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=method, **options)
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(copy.deepcopy(pristine_model(checkpoint)), config)
        wrapped.peft_config["default"].init_lora_weights = True
        initial = save(wrapped, root / f"{method}-initial")
        wrapped.peft_config["default"].init_lora_weights = method
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        converted = save(
            copy.deepcopy(wrapped), root / f"{method}-converted", path_initial_model_for_weight_conversion=str(initial)
        )
        pair = save(wrapped, root / f"{method}-pair")
    shutil.copy(initial / WEIGHTS_FILE, pair / INITIAL_FILE)
    return {f"{method}-converted": converted, f"{method}-pair": pair}

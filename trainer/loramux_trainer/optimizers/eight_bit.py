"""AdamW with states of 8 bits (Dettmers et al., 2022), in memory that is paged to the host, or both: bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loramux_trainer.errors import DeviceInvalid
from loramux_trainer.schema.optim_config import OptimConfig

_CPU_REASONS: Mapping[str, str] = {
    "adamw_8bit": "on a CPU, bitsandbytes expands all of the 8-bit states to float32 at every step",
    "paged_adamw": "there is no memory to page from: on a CPU, bitsandbytes takes an AdamW that is not paged",
    "paged_adamw_8bit": "there is no memory to page from: on a CPU, bitsandbytes takes an AdamW that is not paged",
}


def check_device(optimizer: str, device_type: str) -> None:
    """Raises DeviceInvalid for an optimizer that would not do on this device what it is for."""
    if device_type != "cuda" and optimizer in _CPU_REASONS:
        raise DeviceInvalid(
            "training.optimizer", f"{optimizer} needs a CUDA device ({_CPU_REASONS[optimizer]}); take adamw, or a GPU"
        )


def eight_bit_or_paged_adamw(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`groups` are torch's. Every state is in 8 bits: the library would leave those of small parameters in 32."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

    classes = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
    options = {"lr": config.learning_rate, "betas": config.betas, "min_8bit_size": 0}
    optimizer: torch.optim.Optimizer = classes[config.optimizer](groups, **options)
    return optimizer

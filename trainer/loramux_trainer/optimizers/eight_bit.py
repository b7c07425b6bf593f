"""AdamW with states of 8 bits (Dettmers et al., 2022), in memory that is paged to the host, or both: bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from loramux_trainer.schema.optim_config import OptimConfig


def eight_bit_or_paged_adamw(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`groups` are torch's. Every state is in 8 bits: the library would leave those of small parameters in 32."""
    from loramux_adapters.base.bitsandbytes_compat import AdamW8bit, PagedAdamW, PagedAdamW8bit

    classes = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
    options = {"lr": config.learning_rate, "betas": config.betas, "min_8bit_size": 0}
    optimizer: torch.optim.Optimizer = classes[config.optimizer](groups, **options)
    return optimizer

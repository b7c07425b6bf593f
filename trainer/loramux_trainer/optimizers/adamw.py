"""AdamW (Loshchilov and Hutter, 2019), by torch: fused over a member's flat buffers."""

from __future__ import annotations

from typing import Any

import torch

from loramux_trainer.schema.optim_config import OptimConfig


def adamw(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`groups` are torch's."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)

"""Lion (Chen et al., 2023), by pytorch-optimizer. Its rates are three to ten times smaller than AdamW's."""

from __future__ import annotations

from typing import Any

import torch

from loramux_trainer.schema.optim_config import OptimConfig


def lion(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`groups` are torch's."""
    from pytorch_optimizer import Lion  # a second of imports

    optimizer: torch.optim.Optimizer = Lion(groups, lr=config.learning_rate, betas=config.betas)
    return optimizer

"""SGD with momentum, by torch; its weight decay is added to the gradient."""

from __future__ import annotations

from typing import Any

import torch

from loramux_trainer.schema.optim_config import OptimConfig


def sgd(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`groups` are torch's."""
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum or 0.0)

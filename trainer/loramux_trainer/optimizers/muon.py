"""Muon (Jordan et al., 2024), by torch: over matrices one by one; the rest of a member is AdamW's, as its authors say.

With the rates of AdamW: an update is scaled to AdamW's size (`match_rms_adamw`, Liu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from loramux_trainer.errors import JobInvalid
from loramux_trainer.optimizers.adamw import adamw
from loramux_trainer.optimizers.interface import ParameterGroup
from loramux_trainer.optimizers.library import RATIO, LibraryOptimizer, rate_ratio, torch_groups
from loramux_trainer.schema.optim_config import OptimConfig

_MATRICES = ("a", "b", "matrix")


def muon(config: OptimConfig, groups: Sequence[ParameterGroup], loraplus_lr_ratio: float | None) -> LibraryOptimizer:
    """Raises JobInvalid where there is no matrix to make orthogonal: it would be AdamW under another name."""
    matrices = [group for group in groups if group.role in _MATRICES]
    if not matrices:
        raise JobInvalid("training.optimizer", "muon is for matrices, and this method trains none; take adamw")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            [
                {
                    "params": [_shared(group, name) for name in group.views],
                    RATIO: rate_ratio(group, loraplus_lr_ratio),
                }
                for group in matrices
            ],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum or 0.0,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    if rest := [group for group in groups if group.role not in _MATRICES]:
        optimizers.append(adamw(config, torch_groups(rest, config.weight_decay, None)))
    return LibraryOptimizer(*optimizers)


def _shared(group: ParameterGroup, name: str) -> nn.Parameter:
    """A parameter in the memory of a view, and its gradient in that of the view's."""
    parameter = nn.Parameter(group.views[name].detach())
    parameter.grad = group.gradients[name]
    return parameter

"""Sophia (Liu et al., 2023), by pytorch-optimizer: the step is the momentum over a Hessian's diagonal, clipped.

The estimate of the diagonal is the caller's, at the steps where `needs_hessian` says so (`optimizers.hessian`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramux_trainer.optimizers.library import LibraryOptimizer
from loramux_trainer.schema.optim_config import OptimConfig


class Sophia(LibraryOptimizer):
    """See MemberOptimizer. Takes an estimate before its first step and every `hessian_update_period` steps."""

    def __init__(self, config: OptimConfig, groups: list[dict[str, Any]]) -> None:
        """`groups` are torch's."""
        from pytorch_optimizer import SophiaH  # a second of imports

        self._period = config.hessian_update_period or 1
        self._sophia: Any = SophiaH(groups, lr=config.learning_rate, betas=config.betas, update_period=self._period)
        self._parameters = [parameter for group in self._sophia.param_groups for parameter in group["params"]]
        self._estimates: list[torch.Tensor] | None = None
        super().__init__(self._sophia)

    @property
    def needs_hessian(self) -> bool:
        """See MemberOptimizer."""
        taken: int = self._sophia.param_groups[0].get("step", 0)
        return taken % self._period == 0

    def give_hessian(self, estimates: Sequence[torch.Tensor]) -> None:
        """See MemberOptimizer."""
        if [each.shape for each in estimates] != [each.shape for each in self._parameters]:
            raise ValueError("an estimate a group is needed, in the shape of its buffer")
        self._estimates = list(estimates)

    def step(self, rate: float) -> None:
        """See MemberOptimizer. Raises ValueError where the estimate that it needs was not given."""
        if self.needs_hessian and self._estimates is None:
            raise ValueError("Sophia needs an estimate of the Hessian before this step")
        super().step(rate)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self._sophia.step(hessian=self._estimates)
        self._estimates = None
        for state in self._sophia.state.values():
            state.pop("hessian", None)  # it has gone into the moving average

    def _make_state(self) -> None:
        self._estimates = [torch.zeros_like(parameter) for parameter in self._parameters]
        super()._make_state()

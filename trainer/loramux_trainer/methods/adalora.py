"""AdaLoRA: B (A * E) whose ranks are pruned while it trains, by their importance (Zhang et al., 2023).

The steps are PEFT 0.21's: importance is |weight * gradient|, smoothed, times its smoothed deviation; a budget falls
with the cube of what is left of the schedule; a penalty keeps A and B near orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_trainer.fleet.parameters import FlatParameters
from loramux_trainer.methods.low_rank import whole_biases
from loramux_trainer.methods.method import Control, Method
from loramux_trainer.methods.rules import BaseValues, constant, normal


@dataclass(frozen=True)
class Budget:
    """Ranks left after a step: `first` a module until `warm`, `last` from `total - final` on."""

    first: int
    last: int
    warm: int
    final: int
    every: int
    total: int

    def of(self, step: int, modules: int) -> tuple[int, bool]:
        """(ranks of all modules together, whether to prune now) after 1-based `step`."""
        start, end = self.first * modules, self.last * modules
        if step <= self.warm:
            return start, False
        if step >= self.total - self.final:
            return end, True
        left = 1 - (step - self.warm) / (self.total - self.final - self.warm)
        return int((start - end) * left**3 + end), step % self.every == 0


class RankAllocator(Control):
    """Prunes by setting E to zero, and keeps what is pruned at zero in the end."""

    def __init__(
        self, parameters: FlatParameters, modules: tuple[str, ...], budget: Budget, betas: tuple[float, float]
    ) -> None:
        self._parameters, self._modules, self._budget, self._betas = parameters, modules, budget, betas
        self._importance = torch.zeros_like(parameters.weights)
        self._deviation = torch.zeros_like(parameters.weights)
        rank = len(parameters.views[f"{modules[0]}:e"])
        self.kept = torch.ones(len(modules), rank, dtype=torch.bool, device=parameters.weights.device)

    def after_step(self, step: int) -> None:
        """See Control."""
        end = self._budget.total - self._budget.final
        if step < end:
            self._measure()
        if step <= end:
            ranks, is_time = self._budget.of(step, len(self._modules))
            if is_time:
                self._prune(ranks)
        else:
            self._clear_pruned()

    def tensors(self) -> dict[str, torch.Tensor]:
        """See Control."""
        return {"importance": self._importance, "deviation": self._deviation, "kept": self.kept}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Control."""
        self._importance.copy_(tensors["importance"])
        self._deviation.copy_(tensors["deviation"])
        self.kept.copy_(tensors["kept"])

    def finish(
        self, config: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
        """Without the ranks that were pruned, as PEFT saves it."""
        pattern = {}
        for name, kept in zip(self._modules, self.kept.cpu(), strict=True):
            pattern[f"{name}.lora_E"] = kept.tolist()
            tensors[name, "a"] = tensors[name, "a"][kept]
            tensors[name, "e"] = tensors[name, "e"][kept]
            tensors[name, "b"] = tensors[name, "b"][:, kept]
        return config if self.kept.all() else config | {"rank_pattern": pattern}, tensors

    def _measure(self) -> None:
        weights, gradients = self._parameters.weights, self._parameters.gradients
        now = (weights * gradients).abs()
        first, second = self._betas
        self._importance.mul_(first).add_(now, alpha=1 - first)
        self._deviation.mul_(second).add_((now - self._importance).abs(), alpha=1 - second)

    def _prune(self, ranks: int) -> None:
        scores = self._parameters.shaped(self._importance * self._deviation)
        triplets = torch.stack(
            [
                scores[f"{name}:e"][:, 0] + scores[f"{name}:a"].mean(1) + scores[f"{name}:b"].mean(0)
                for name in self._modules
            ]
        )
        pruned = triplets.numel() - ranks
        if pruned > 0:
            self.kept = triplets > torch.kthvalue(triplets.flatten(), pruned).values
            self._clear_pruned()

    def _clear_pruned(self) -> None:
        for name, kept in zip(self._modules, self.kept, strict=True):
            self._parameters.views[f"{name}:e"][~kept] = 0.0


def adalora(
    config: Mapping[str, Any],
    seed: int,
    base: BaseValues,
    budget: Budget,
    *,
    betas: tuple[float, float] = (0.85, 0.85),
    orthogonality: float = 0.5,
) -> Method:
    """`config` without the keys of the schedule, which `budget` gives; `orthogonality` is the penalty's weight."""
    schedule = {
        "init_r": budget.first,
        "target_r": budget.last,
        "tinit": budget.warm,
        "tfinal": budget.final,
        "deltaT": budget.every,
        "total_step": budget.total,
        "beta1": betas[0],
        "beta2": betas[1],
        "orth_reg_weight": orthogonality,
    }
    rules = {"a": normal(0.02, "a"), "b": normal(0.02, "b"), "e": constant(0.0, "vector")}
    return Method(
        {"peft_type": "ADALORA", **config, **schedule},
        seed,
        rules | whole_biases(base),
        found=lambda _: {"a": (budget.first, 0)},
        penalty=lambda leaves: orthogonality * _distance_from_orthogonal(leaves),
        control=lambda parameters: RankAllocator(parameters, _modules(parameters), budget, betas),
    )


def _modules(parameters: FlatParameters) -> tuple[str, ...]:
    return tuple(name.removesuffix(":e") for name in parameters.views if name.endswith(":e"))


def _distance_from_orthogonal(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over all A and B of the distance of A A^T, and B^T B, from the identity."""
    distances = []
    for name, leaf in leaves.items():
        if name.endswith((":a", ":b")):
            gram = leaf @ leaf.T if name.endswith(":a") else leaf.T @ leaf
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return torch.stack(distances).mean()

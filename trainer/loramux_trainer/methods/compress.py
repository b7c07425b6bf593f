"""A low rank brought to a smaller one, with what that loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from loramux_trainer.methods.method import Control

Tell = Callable[[str], None]
"""Is told what a user should know."""


def compress(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [R, in], B [out, R] -> the best of at most `rank` rows, and the share of the energy of B A that is left."""
    if len(a) <= rank:
        return a, b, 1.0
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    left = float(s[:rank].square().sum() / s.square().sum().clamp_min(1e-30))
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root, left


class Compressed(Control):
    """What is exported has at most a rank budget."""

    is_exact = False

    def __init__(self, rank_budget: int, tell: Tell) -> None:
        self._rank_budget, self._tell = rank_budget, tell

    def finish(
        self, config: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]
    ) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
        """At the scale that each module has."""
        least = 1.0
        scale_of = _scales(config, [module for module, role in tensors if role == "a"], tensors)
        for module in scale_of:
            tensors[module, "a"], tensors[module, "b"], left = compress(
                tensors[module, "a"], tensors[module, "b"], self._rank_budget
            )
            least = min(least, left)
        self._tell(f"rank budget {self._rank_budget}: the worst module keeps {least:.2%} of its energy")
        return config | patterns({m: len(tensors[m, "a"]) for m in scale_of}, scale_of, config), tensors


def patterns(ranks: Mapping[str, int], scales: Mapping[str, float], config: Mapping[str, Any]) -> dict[str, Any]:
    """r, lora_alpha and patterns of a config whose modules have these ranks and scales."""
    power = 0.5 if config.get("use_rslora") else 1.0
    alphas = {name: scales[name] * rank**power for name, rank in ranks.items()}
    most = max(ranks, key=lambda name: ranks[name])
    return {
        "r": ranks[most],
        "lora_alpha": alphas[most],
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != ranks[most]},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[most]},
    }


def _scales(
    config: Mapping[str, Any], modules: list[str], tensors: Mapping[tuple[str, str], torch.Tensor]
) -> dict[str, float]:
    power = 0.5 if config.get("use_rslora") else 1.0
    alphas = config.get("alpha_pattern", {})
    return {name: alphas.get(f"^{name}", config["lora_alpha"]) / len(tensors[name, "a"]) ** power for name in modules}

"""A low rank brought to a smaller one, with what that loses; and the ranks and scales of modules as PEFT's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def compress(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [R, in], B [out, R] -> the best of at most `rank` rows, and the share of the energy of B A that is left."""
    if len(a) <= rank:
        return a, b, 1.0
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    energy = float(s.square().sum())
    left = float(s[:rank].square().sum()) / energy if energy else 1.0  # of nothing, nothing is lost
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root, left


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

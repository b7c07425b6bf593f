"""Low ranks that begin elsewhere than at zero without moving the base: y = W x + s (B A - B0 A0) x, B0 A0 frozen.

PiSSA, OLoRA, CorDA and LoRA-GA start from factors of the weight, of its input or of its gradient, and take them off the
base. Here the base stays as it is and the initial pair is taken off beside it: the first logits are unchanged, the
trajectory is the same, and what is exported is an exact LoRA of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from loramux_trainer.methods.compress import Compressed, Tell
from loramux_trainer.methods.initial_pairs import Pair
from loramux_trainer.methods.low_rank import whole_biases
from loramux_trainer.methods.method import Beginning, Made, Method, Rule, Start
from loramux_trainer.methods.rules import BaseValues


def delta_lora(
    config: Mapping[str, Any],
    seed: int,
    base: BaseValues,
    pair_of: Callable[[str], Pair],
    *,
    rank_budget: int | None = None,
    tell: Tell = lambda _: None,
) -> Method:
    """`config` says the rank and alpha that are trained; the file has twice of both, which is the same scale.

    With a `rank_budget` the export is compressed to it, and `tell` hears what that loses.
    """
    pairs: dict[str, Pair] = {}

    def pair(module: str) -> Pair:
        if module not in pairs:
            pairs[module] = pair_of(module)
        return pairs[module]

    def of_a(begin: Beginning) -> Made:
        initial = pair(begin.module)[0]
        starts = {"trained": Start(initial, "a"), "initial": Start(initial.clone(), None)}
        return Made(starts, lambda tensors: torch.cat([tensors["trained"], tensors["initial"]]))

    def of_b(begin: Beginning) -> Made:
        initial = pair(begin.module)[1]
        starts = {"trained": Start(initial, "b"), "initial": Start(initial.clone(), None)}
        return Made(starts, lambda tensors: torch.cat([tensors["trained"], -tensors["initial"]], dim=1))

    rules: dict[str, Rule] = {"a": of_a, "b": of_b}
    method = Method({"peft_type": "LORA", **doubled(config)}, seed, rules | whole_biases(base))
    return method if rank_budget is None else replace(method, control=lambda _: Compressed(rank_budget, tell))


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Twice the rank at the same scale: alpha / r, or alpha / sqrt(r) where it is rank-stabilized."""
    factor = 2**0.5 if config.get("use_rslora") else 2
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in config.get("rank_pattern", {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config.get("alpha_pattern", {}).items()},
    }

"""An export brought to a smaller rank, and what that loses told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from loramux_adapters.compressing import compress, patterns
from loramux_trainer.methods.method import Control

Tell = Callable[[str], None]
"""Is told what a user should know."""


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


def _scales(
    config: Mapping[str, Any], modules: list[str], tensors: Mapping[tuple[str, str], torch.Tensor]
) -> dict[str, float]:
    power = 0.5 if config.get("use_rslora") else 1.0
    alphas = config.get("alpha_pattern", {})
    return {name: alphas.get(f"^{name}", config["lora_alpha"]) / len(tensors[name, "a"]) ** power for name in modules}

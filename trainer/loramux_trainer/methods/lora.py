"""LoRA: A and B at a rank of each module's own (Hu et al., 2021), rank-stabilized (Kalajdzievski, 2023), and with
magnitudes (DoRA: Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.formats.peft.tuner import Shape, Target
from loramux_trainer.methods.method import Start
from loramux_trainer.methods.random import generator, kaiming


@dataclass(frozen=True)
class Lora:
    """`start_of` gives the first values of what is not drawn at random: magnitudes and biases are those of the base."""

    config: Mapping[str, Any]
    seed: int
    start_of: Callable[[str, str], torch.Tensor]

    def shapes(self, module: str, target: Target) -> Mapping[str, Shape]:
        """See Method."""
        return target.shapes({})

    def start(self, module: str, role: str, shape: Shape) -> Start:
        """A as PEFT draws it, kaiming uniform with a = sqrt(5); B zero, so that the model is unchanged at first."""
        if role == "a":
            return Start(kaiming(shape, generator(self.seed, module)), "a")
        if role in ("b", "b_bias"):
            return Start(torch.zeros(shape), "b" if role == "b" else "vector")
        return Start(self.start_of(module, role), "vector")

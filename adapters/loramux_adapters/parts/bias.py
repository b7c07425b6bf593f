"""Bias: an adapter's whole bias in place of the base's own (BitFit, PEFT's `bias`, `lora_bias`), of LayerNorms too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class Bias(Part):
    """The whole effective bias of one module; with `is_delta`, what comes to the base's own."""

    value: torch.Tensor  # [out], float32
    is_delta: bool = False


class BiasDeltas(VectorParts[Bias]):
    """Keeps the difference to the base's own bias, which the frozen map has added already."""

    def vector(self, member: int, part: Bias) -> torch.Tensor:
        """The difference [out]."""
        own = self.site.own_bias(member)
        return part.value if own is None or part.is_delta else part.value - own

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Adds each segment's difference to its rows."""
        for member, (begin, end) in enumerate(self.site.columns):
            for rows, delta in self.acting(member, step):
                y[rows, begin:end] += delta


def _fold(_weight: torch.Tensor, bias: torch.Tensor, part: Bias) -> None:
    bias.copy_(part.value.to(bias) + bias if part.is_delta else part.value)


KIND = Kind(Bias, {"linear": BiasDeltas, "norm": BiasDeltas}, _fold)

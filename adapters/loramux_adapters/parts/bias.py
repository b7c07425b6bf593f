"""Bias: an adapter's whole bias in place of the base's own (BitFit, PEFT's `bias`, `lora_bias`), of LayerNorms too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, Share
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class Bias(Part):
    """A module's whole effective bias is `value` and `base_share` times the base's own."""

    value: torch.Tensor  # [out], float32
    base_share: float = 0.0  # 1: the value comes to the base's own bias


class BiasDeltas(VectorParts[Bias]):
    """Keeps the difference to the base's own bias, which the frozen map has added already."""

    def vector(self, member: int, part: Bias) -> torch.Tensor:
        """The difference [out]."""
        own = self.site.own_bias(member)
        return part.value if own is None or part.base_share == 1.0 else part.value - (1.0 - part.base_share) * own

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Adds each segment's difference to its rows."""
        for member, (begin, end) in enumerate(self.site.columns):
            for rows, delta in self.acting(member, step):
                y[rows, begin:end] += delta


def _fold(_weight: torch.Tensor, bias: torch.Tensor, part: Bias) -> None:
    bias.mul_(part.base_share).add_(part.value.to(bias))


def _combine(shares: Sequence[Share[Bias]]) -> Bias:
    """own + sum of w * (value + (base_share - 1) * own)"""
    value = torch.stack([share.weight * share.part.value for share in shares]).sum(0)
    return Bias(value, 1.0 + sum(share.weight * (share.part.base_share - 1.0) for share in shares))


KIND = Kind(Bias, {"linear": BiasDeltas, "norm": BiasDeltas}, _fold, _combine)

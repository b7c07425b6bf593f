"""Norm weight: a normalization's own weight in place of the base's (LN tuning: Zhao et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class NormWeight(Part):
    """The whole weight, as the module stores it (some add 1 to it)."""

    value: torch.Tensor  # [width], float32


class NormWeights(VectorParts[NormWeight]):
    """At normalizations: the rows are normalized anew by the module's own arithmetic."""

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the adapter's own where the frozen one's were."""
        for rows, weight in self.acting(0, step):
            y[rows] = self.site.normalized(inputs[0][rows], weight)


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: NormWeight) -> None:
    """Nothing of it is in a linear map's weight."""


KIND = Kind(NormWeight, {"norm": NormWeights}, _fold, unfoldable="a norm is no linear map, and acts as it is")

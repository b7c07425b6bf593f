"""Norm weight: a normalization's own weight in place of the base's (LN tuning: Zhao et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, Share, finite
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class NormWeight(Part):
    """The whole weight, as the module stores it (some add 1 to it), is `value` and `base_share` times the base's."""

    value: torch.Tensor  # [width], float32
    base_share: float = 0.0


class NormWeights(VectorParts[NormWeight]):
    """At normalizations: the rows are normalized anew by the module's own arithmetic."""

    def write(
        self,
        slot: int,
        member: int,
        part: NormWeight,
        prepared: Sequence[torch.Tensor],
        rank_rows: tuple[int, int] | None,
    ) -> None:
        """See SiteParts."""
        if part.base_share:
            value = part.value.to(self.site.device, non_blocking=True)
            whole = self.site.frozen_weight(member).mul_(part.base_share).add_(value)
            prepared = (finite(self.site.members[member], whole.to(self.site.dtype)),)
        super().write(slot, member, part, prepared, rank_rows)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the adapter's own where the frozen one's were."""
        for rows, weight in self.acting(0, step):
            y[rows] = self.site.normalized(inputs[0][rows], weight)


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: NormWeight) -> None:
    """Nothing of it is in a linear map's weight."""


def _combine(shares: Sequence[Share[NormWeight]]) -> NormWeight:
    """own + sum of w * (value + (base_share - 1) * own)"""
    value = torch.stack([share.weight * share.part.value for share in shares]).sum(0)
    return NormWeight(value, 1.0 + sum(share.weight * (share.part.base_share - 1.0) for share in shares))


KIND = Kind(NormWeight, {"norm": NormWeights}, _fold, _combine, unfoldable="a norm is no linear map, and acts as it is")

"""Output gain: y = gain * (what the frozen map and the low rank give), the base's bias left out (DoRA, IA3).

DoRA (Liu et al., 2024) scales each output by m / ||W + B A||, which is constant as the base is frozen; IA3 (Liu et al.,
2022) by a learned vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part
from loramux_adapters.parts.site import Site, StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class OutputGain(Part):
    """One factor per output of a module."""

    gain: torch.Tensor  # [out], float32


class OutputGains(VectorParts[OutputGain]):
    """At linear maps."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._bias: torch.Tensor | None = None  # the base's own, on the device from the first write on

    def write(
        self, slot: int, member: int, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """See SiteParts."""
        if self._bias is None and self.site.bias is not None:
            self._bias = self.site.bias.to(self.site.device, self.site.dtype)
        super().write(slot, member, prepared, rank_rows)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Takes the base's own bias out, scales, and adds it again."""
        for member, (begin, end) in enumerate(self.site.columns):
            for rows, gain in self.acting(member, step):
                if self._bias is None:
                    y[rows, begin:end] *= gain
                else:
                    own = self._bias[begin:end]
                    y[rows, begin:end] = (y[rows, begin:end] - own) * gain + own


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: OutputGain) -> None:
    weight.mul_(part.gain.to(weight)[:, None])


KIND = Kind(OutputGain, {"linear": OutputGains}, _fold)

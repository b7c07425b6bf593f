"""Input gain: a module reads gain * x in place of x (IA3 on feed-forward layers, Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, Share
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts, product


@dataclass(frozen=True, eq=False)
class InputGain(Part):
    """One factor per input of a module."""

    gain: torch.Tensor  # [in], float32


class InputGains(VectorParts[InputGain]):
    """At linear maps; siblings of the same input may have different ones."""

    def before(self, x: torch.Tensor, member: int, step: StepRows) -> torch.Tensor:
        """A scaled copy where a row of this step has a gain on the member, else x itself."""
        scaled = x
        for rows, gain in self.acting(member, step):
            scaled = x.clone() if scaled is x else scaled
            scaled[rows] *= gain
        return scaled


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: InputGain) -> None:
    weight.mul_(part.gain.to(weight))


def _combine(shares: Sequence[Share[InputGain]]) -> InputGain:
    return InputGain(product([(share.part.gain, share.weight) for share in shares]))


KIND = Kind(InputGain, {"linear": InputGains}, _fold, _combine, changes_input=True)

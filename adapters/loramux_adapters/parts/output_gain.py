"""Output gain: y = gain * (what the frozen map and the low rank give), with the base's own bias or without it.

IA3 (Liu et al., 2022) scales each output, the bias included, by a learned vector; see `magnitude` for DoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from loramux_adapters.parts.part import Kind, Part, PartCost, Share
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts, product

P = TypeVar("P", bound=Part)


@dataclass(frozen=True, eq=False)
class OutputGain(Part):
    """One factor per output of a module; `with_bias` where the base's own bias is scaled too."""

    gain: torch.Tensor  # [out], float32
    with_bias: bool = False


class GainParts(VectorParts[P]):
    """Keeps (gain, shift) [2, out]: y = gain * y + shift, where the shift gives the base's own bias back.

    Without anything to give back it is [1, out].
    """

    def cost(self, part: P) -> PartCost:
        """Bytes of both."""
        return PartCost(nbytes=2 * part.tensors[0].numel() * self.site.dtype.itemsize)

    def gain_and_shift(self, member: int, gain: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        """What is kept of a gain [out], on its device and in its dtype."""
        own = self.site.own_bias(member)
        if with_bias or own is None:
            return gain[None]
        return torch.stack([gain, own.to(gain) * (1 - gain)])

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Scales each segment's rows."""
        for member, (begin, end) in enumerate(self.site.columns):
            for rows, kept in self.acting(member, step):
                y[rows, begin:end] *= kept[0]
                if len(kept) > 1:
                    y[rows, begin:end] += kept[1]


class OutputGains(GainParts[OutputGain]):
    """Gains that the adapter brings."""

    def vector(self, member: int, part: OutputGain) -> torch.Tensor:
        """See GainParts."""
        return self.gain_and_shift(member, part.gain, with_bias=part.with_bias)


def _fold(weight: torch.Tensor, bias: torch.Tensor, part: OutputGain) -> None:
    weight.mul_(part.gain.to(weight)[:, None])
    if part.with_bias:
        bias.mul_(part.gain.to(bias))


def _combine(shares: Sequence[Share[OutputGain]]) -> OutputGain | None:
    if len({share.part.with_bias for share in shares}) > 1:
        return None
    return OutputGain(product([(share.part.gain, share.weight) for share in shares]), shares[0].part.with_bias)


KIND = Kind(OutputGain, {"linear": OutputGains}, _fold, _combine)

"""Magnitude: each row of W + B A is scaled to a learned length, y = m / ||W + B A|| * (W x + B A x) + bias.

DoRA (Liu et al., 2024). As the base is frozen the factor is a constant: it is computed once per adapter and base, where
the adapter is copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.output_gain import GainParts
from loramux_adapters.parts.part import Kind, Part, no_sum
from loramux_adapters.parts.site import Site


@dataclass(frozen=True, eq=False)
class Magnitude(Part):
    """The lengths of the rows of a module's weight, and the low rank that is part of the weight."""

    length: torch.Tensor  # [out], float32
    low_rank: LowRank  # the module's own, which stands beside this part


class Magnitudes(GainParts[Magnitude]):
    """Keeps the gains that the lengths come to on this base."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._computed: WeakKeyDictionary[Magnitude, torch.Tensor] = WeakKeyDictionary()

    def prepare(self, member: int, part: Magnitude) -> tuple[torch.Tensor, ...]:
        """(length [out], A [r, in], B [out, r]) in float32"""
        return part.length, part.low_rank.a.float(), part.low_rank.b

    def work(self, member: int, part: Magnitude) -> int:
        """The codes of the weight."""
        return 0 if part in self._computed else part.low_rank.a.shape[1] * part.length.numel() // 2

    def write(
        self,
        slot: int,
        member: int,
        part: Magnitude,
        prepared: Sequence[torch.Tensor],
        rank_rows: tuple[int, int] | None,
    ) -> None:
        """Computes the gain; the adapter may come back and find it."""
        kept = self._computed.get(part)
        if kept is None:
            length, a, b = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
            gain = length / self.site.frozen_weight(member).addmm_(b, a).norm(dim=1)
            kept = self.gain_and_shift(member, gain, with_bias=False).to(self.site.dtype)
            if not torch.isfinite(kept).all():
                name = self.site.members[member]
                raise AdapterIncompatible(
                    f"{name}: a magnitude over the length of its row is not finite",
                    subject=name,
                    remedy="check lora_magnitude_vector: a row of this base and adapter has length 0",
                )
            self._computed[part] = kept
        self.keep(slot, member, kept)


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: Magnitude) -> None:
    """The low rank is in the weight already."""
    weight.mul_((part.length.to(weight) / weight.norm(dim=1))[:, None])


KIND = Kind(Magnitude, {"linear": Magnitudes, "embedding": Magnitudes}, _fold, no_sum, in_weight=True)

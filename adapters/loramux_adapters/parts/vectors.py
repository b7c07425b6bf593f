"""What kinds of parts share that are one small tensor per slot and member: a bias, a gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from loramux_adapters.parts.part import Part, PartCost, SiteParts, finite
from loramux_adapters.parts.site import Site, StepRows

P = TypeVar("P", bound=Part)


def product(gains: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """(gain, weight), several -> the gain that they come to: each is 1 + weight * (gain - 1), and they multiply."""
    return torch.stack([torch.lerp(torch.ones_like(gain), gain, weight) for gain, weight in gains]).prod(0)


class VectorParts(SiteParts[P]):
    """Keeps one tensor in the compute dtype per slot and member, each for itself."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.values: list[Mapping[int, torch.Tensor]] = [{} for _ in site.members]  # slot -> vector
        self._written: dict[int, dict[int, torch.Tensor]] = {}

    def vector(self, member: int, part: P) -> torch.Tensor:
        """What is kept of a part, float32 in host memory."""
        return part.tensors[0]

    def cost(self, part: P) -> PartCost:
        """Bytes of the vector."""
        return PartCost(nbytes=part.tensors[0].numel() * self.site.dtype.itemsize)

    def prepare(self, member: int, part: P) -> tuple[torch.Tensor, ...]:
        """(vector,)"""
        return (finite(self.site.members[member], self.vector(member, part).to(self.site.dtype)),)

    def write(
        self, slot: int, member: int, part: P, prepared: Sequence[torch.Tensor], rank_rows: tuple[int, int] | None
    ) -> None:
        """See SiteParts."""
        (vector,) = prepared
        self.keep(slot, member, vector.to(self.site.device, non_blocking=True))

    def keep(self, slot: int, member: int, value: torch.Tensor) -> None:
        """Has a tensor on the device ready for `bind`."""
        self._written.setdefault(slot, {})[member] = value

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        for member, vector in self._written.get(slot, {}).items():
            self.values[member] = {**self.values[member], slot: vector}
        self._written.pop(slot, None)

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._written.pop(slot, None)
        for member, known in enumerate(self.values):
            if slot in known:
                self.values[member] = {key: vector for key, vector in known.items() if key != slot}

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return any(slot in known for known in self.values)

    def acting(self, member: int, step: StepRows) -> Iterator[tuple[slice, torch.Tensor]]:
        """The step's rows that have a vector on this member, and it."""
        known = self.values[member]
        for start, stop, slot in step.segments if known else ():
            if slot in known:
                yield slice(start, stop), known[slot]

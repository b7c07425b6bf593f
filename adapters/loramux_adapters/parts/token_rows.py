"""Token rows: trained rows of the embedding or the head in place of the base's, of some tokens or of all.

PEFT's trainable tokens, and an embedding that was trained whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from loramux_adapters.parts.part import Kind, Part, PartCost, SiteParts, finite, no_sum
from loramux_adapters.parts.site import Product, Site, StepRows


@dataclass(frozen=True, eq=False)
class TokenRows(Part):
    """Which tokens, and their rows."""

    ids: torch.Tensor  # [k] int64, rising
    rows: torch.Tensor  # [k, hidden], in the dtype it was uploaded in


K = TypeVar("K")


class _Tables(SiteParts[TokenRows], Generic[K]):
    """Keeps one K for each slot: what its tokens are, and what stands for their rows."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.bound: Mapping[int, K] = {}
        self._written: dict[int, K] = {}

    def cost(self, part: TokenRows) -> PartCost:
        """Bytes of the rows and of their ids."""
        return PartCost(nbytes=part.rows.numel() * self.site.dtype.itemsize + part.ids.numel() * 8)

    def prepare(self, member: int, part: TokenRows) -> tuple[torch.Tensor, ...]:
        """(ids [k], rows [k, hidden])"""
        rows = part.rows.float() * (self.site.output_scale or 1.0)
        return part.ids, finite(self.site.members[member], rows.to(self.site.dtype))

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        if slot in self._written:
            self.bound = {**self.bound, slot: self._written[slot]}
            del self._written[slot]

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._written.pop(slot, None)
        self.bound = {key: kept for key, kept in self.bound.items() if key != slot}

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return slot in self.bound


class EmbeddingRows(_Tables[tuple[torch.Tensor, torch.Tensor]]):
    """At an embedding, whose input are token ids."""

    def write(
        self,
        slot: int,
        member: int,
        part: TokenRows,
        prepared: Sequence[torch.Tensor],
        rank_rows: tuple[int, int] | None,
    ) -> None:
        """See SiteParts."""
        ids, rows = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
        self._written[slot] = (ids, rows)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the trained row where a token has one."""
        for start, stop, slot in step.segments:
            if slot in self.bound:
                known, table = self.bound[slot]
                ids = inputs[0][start:stop]
                places = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
                y[start:stop] = torch.where((known[places] == ids)[:, None], table[places], y[start:stop])


class HeadRows(_Tables[tuple[torch.Tensor, Product]]):
    """At the head: the logits of these tokens are computed anew, by the product that serves a dense weight."""

    def write(
        self,
        slot: int,
        member: int,
        part: TokenRows,
        prepared: Sequence[torch.Tensor],
        rank_rows: tuple[int, int] | None,
    ) -> None:
        """See SiteParts."""
        ids, rows = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
        own = self.site.own_bias(member)
        bias = None if own is None else own.to(self.site.device, self.site.dtype)[ids]
        self._written[slot] = (ids, self.site.multiply(rows, bias))

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Replaces the columns of these tokens."""
        for start, stop, slot in self._acting(step):
            ids, product = self.bound[slot]
            y[start:stop].index_copy_(1, ids, product(inputs[0][start:stop]))

    def _acting(self, step: StepRows) -> Iterator[tuple[int, int, int]]:
        return ((start, stop, slot) for start, stop, slot in step.segments if slot in self.bound)


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: TokenRows) -> None:
    weight[part.ids.to(weight.device)] = part.rows.to(weight)


KIND = Kind(TokenRows, {"embedding": EmbeddingRows, "linear": HeadRows}, _fold, no_sum, in_weight=True)

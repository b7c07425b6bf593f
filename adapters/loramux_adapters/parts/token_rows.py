"""Token rows: trained rows of the embedding or the head in place of the base's, of some tokens or of all.

PEFT's trainable tokens, and an embedding that was trained whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from loramux_adapters.parts.part import Kind, Part, PartCost, Share, SiteParts, finite
from loramux_adapters.parts.site import Product, Site, StepRows


@dataclass(frozen=True, eq=False)
class TokenRows(Part):
    """Which tokens, and their rows; with a `base_share`, what comes to so much of the base's own."""

    ids: torch.Tensor  # [k] int64, rising
    rows: torch.Tensor  # [k, hidden], in the dtype it was uploaded in
    base_share: torch.Tensor | None = None  # [k, 1], float32; None: 0 for all


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
        """(ids [k], rows [k, hidden]), and base_share [k, 1] where there is one"""
        rows = part.rows.float() * (self.site.output_scale or 1.0)
        share = () if part.base_share is None else (part.base_share.to(self.site.dtype),)
        return part.ids, finite(self.site.members[member], rows.to(self.site.dtype)), *share

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


class EmbeddingRows(_Tables[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]):
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
        ids, rows, *share = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
        self._written[slot] = (ids, rows, share[0] if share else None)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the trained row where a token has one."""
        for start, stop, slot in step.segments:
            if slot in self.bound:
                known, table, share = self.bound[slot]
                ids = inputs[0][start:stop]
                places = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
                rows = table[places] if share is None else table[places] + share[places] * y[start:stop]
                y[start:stop] = torch.where((known[places] == ids)[:, None], rows, y[start:stop])


class HeadRows(_Tables[tuple[torch.Tensor, Product, torch.Tensor | None]]):
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
        ids, rows, *share = (tensor.to(self.site.device, non_blocking=True) for tensor in prepared)
        own = self.site.own_bias(member)
        bias = None if own is None else own.to(self.site.device, self.site.dtype)[ids]
        if bias is not None and share:
            bias = bias * (1 - share[0][:, 0])
        self._written[slot] = (ids, self.site.multiply(rows, bias), share[0].T if share else None)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Replaces the columns of these tokens."""
        for start, stop, slot in self._acting(step):
            ids, product, share = self.bound[slot]
            logits = product(inputs[0][start:stop])
            if share is not None:
                logits += share * y[start:stop, ids]
            y[start:stop].index_copy_(1, ids, logits)

    def _acting(self, step: StepRows) -> Iterator[tuple[int, int, int]]:
        return ((start, stop, slot) for start, stop, slot in step.segments if slot in self.bound)


def _fold(weight: torch.Tensor, _bias: torch.Tensor, part: TokenRows) -> None:
    ids, rows = part.ids.to(weight.device), part.rows.to(weight)
    weight[ids] = rows if part.base_share is None else rows + part.base_share.to(weight) * weight[ids]


def _combine(shares: Sequence[Share[TokenRows]]) -> TokenRows:
    """Of each token own + sum of w * (row + (base_share - 1) * own), over the adapters that have it."""
    ids = torch.unique(torch.cat([share.part.ids for share in shares]))
    rows = torch.zeros(len(ids), shares[0].part.rows.shape[1])
    base_share = torch.ones(len(ids), 1)
    for share in shares:
        part, places = share.part, torch.searchsorted(ids, share.part.ids)
        rows[places] += share.weight * part.rows.float()
        base_share[places] += share.weight * (-1.0 if part.base_share is None else part.base_share - 1.0)
    return TokenRows(ids, rows, base_share)


KIND = Kind(TokenRows, {"embedding": EmbeddingRows, "linear": HeadRows}, _fold, _combine, in_weight=True)

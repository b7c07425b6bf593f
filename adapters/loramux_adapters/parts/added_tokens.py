"""Added tokens: rows of the embedding and the head beyond the base's vocabulary, of an adapter that resized it.

Nothing of the base's own product changes: the head's output gets further columns, which only the rows of such adapters
fill and read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, no_sum
from loramux_adapters.parts.site import Product, Site, StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class AddedTokens(Part):
    """The rows of the ids from the base's vocabulary on."""

    rows: torch.Tensor  # [n, hidden], in the dtype it was uploaded in or float32


class AddedEmbeddings(VectorParts[AddedTokens]):
    """At the embedding, whose input are token ids."""

    def vector(self, member: int, part: AddedTokens) -> torch.Tensor:
        """The rows as the embedding gives them."""
        return part.rows.float() * (self.site.output_scale or 1.0)

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts their rows where the base has none."""
        for rows, table in self.acting(0, step):
            number = inputs[0][rows] - self.site.in_features
            picked = table[number.clamp(0, len(table) - 1)]
            y[rows] = torch.where((number >= 0)[:, None], picked, y[rows])


class AddedLogits(VectorParts[AddedTokens]):
    """At the head: the logits of the added tokens are products of their own."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._products: Mapping[int, Product] = {}

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        super().bind(slot)
        if slot in self.values[0]:
            self._products = {**self._products, slot: self.site.multiply(self.values[0][slot], None)}

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._products = {key: product for key, product in self._products.items() if key != slot}
        super().unbind(slot)

    def extend(self, y: torch.Tensor, x: torch.Tensor, step: StepRows) -> None:
        """See SiteParts."""
        first = self.site.columns[-1][1]
        for start, stop, slot in step.segments:
            if slot in self._products:
                logits = self._products[slot](x[start:stop])
                y[start:stop, first : first + logits.shape[1]] = logits


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: AddedTokens) -> None:
    """The base's weight has no row for them."""


KIND = Kind(AddedTokens, {"embedding": AddedEmbeddings, "linear": AddedLogits}, _fold, no_sum)

"""Virtual tokens: trained embeddings of positions before the prompt (Lester et al., 2021; Liu et al., 2021).

Their token ids are negative, see `loramux_adapters.spec.virtual_token_ids`; everything behind the embedding treats them
as it does any token, so their KV is computed once and then found like that of a shared prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, no_sum
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class VirtualTokens(Part):
    """What the embedding gives for them."""

    rows: torch.Tensor  # [n, hidden], float32


class VirtualRows(VectorParts[VirtualTokens]):
    """At the embedding, whose input are token ids."""

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """The trained rows, unscaled and whatever else acts on an embedding."""
        for rows, table in self.acting(0, step):
            number = -1 - inputs[0][rows]
            picked = table[number.clamp(0, len(table) - 1)]
            y[rows] = torch.where((number >= 0)[:, None], picked, y[rows])


_UNFOLDABLE = "virtual tokens before the prompt are in no weight"


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: VirtualTokens) -> None:
    """Nothing of it is in a weight."""


KIND = Kind(VirtualTokens, {"embedding": VirtualRows}, _fold, no_sum, for_virtual_ids=True, unfoldable=_UNFOLDABLE)

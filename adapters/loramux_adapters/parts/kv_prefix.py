"""KV prefix: trained keys and values of positions before the prompt, in every layer (Li and Liang, 2021; cartridges:
Eyuboglu et al., 2025).

The positions have virtual token ids and run through the model as any others; their keys and values are replaced where
the attention writes them to the cache. So they lie in blocks of the same pool, are written once, and are then shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.parts.part import Kind, Part, no_sum
from loramux_adapters.parts.site import StepRows
from loramux_adapters.parts.vectors import VectorParts


@dataclass(frozen=True, eq=False)
class KvPrefix(Part):
    """One layer's keys and values side by side, as they lie in the cache: no rotation is applied to them."""

    rows: torch.Tensor  # [n, heads * key width + heads * value width], float32


class KvPrefixes(VectorParts[KvPrefix]):
    """At a layer's attention: the output are its keys and values side by side, the input token ids."""

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Replaces the rows of virtual tokens."""
        for rows, table in self.acting(0, step):
            number = -1 - inputs[0][rows]
            picked = table[number.clamp(0, len(table) - 1)]
            y[rows] = torch.where((number >= 0)[:, None], picked, y[rows])


_UNFOLDABLE = "keys and values before the prompt are in no weight"


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: KvPrefix) -> None:
    """Nothing of it is in a weight."""


KIND = Kind(KvPrefix, {"attention": KvPrefixes}, _fold, no_sum, for_virtual_ids=True, unfoldable=_UNFOLDABLE)

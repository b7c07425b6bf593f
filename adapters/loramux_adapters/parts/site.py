"""Where parts act, and what they see of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from loramux_adapters.kernels.protocol import LowRankPools, SlotSegment
from loramux_adapters.parts.rank_rows import RankRowsTable

Product = Callable[[torch.Tensor], torch.Tensor]
"""[T, in] -> a new tensor [T, out], in the compute dtype."""

MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""A dense weight [out, in] and a bias [out] on the device, in the compute dtype -> their product."""

Normalize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x [..., width] and a weight [width] -> what the normalization gives with it."""

SiteKind = Literal["linear", "embedding", "norm", "attention", "sublayer"]


@dataclass(frozen=True, eq=False)
class Site:
    """One module, or several siblings that read the same input and write to one output side by side."""

    kind: SiteKind
    members: tuple[str, ...]  # module names
    columns: tuple[tuple[int, int], ...]  # of each member in the output: [from, to)
    in_features: int  # for an embedding the vocabulary
    dtype: torch.dtype
    device: torch.device
    bias: torch.Tensor | None  # the base's own, [all columns], float32 in host memory
    rank_rows: RankRowsTable
    output_scale: float | None = None  # what an embedding multiplies its output by
    weight: Callable[[int], torch.Tensor] | None = None  # of a member, see `frozen_weight`
    make_product: MakeProduct | None = None  # at linear maps and sub-layers
    normalize: Normalize | None = None  # at normalizations
    is_invariant: bool = False  # whether a row's numbers may depend on that row alone; told at sub-layers

    def frozen_weight(self, member: int) -> torch.Tensor:
        """The base's weight [out, in] of one member, float32 on the device; the caller may write to it.

        Of an embedding the table transposed, of a normalization its weight [width]. Computed anew at every call, and by
        the owner of the device alone.
        """
        if self.weight is None:
            raise ValueError(f"{self.members[member]} has no weight")
        return self.weight(member)

    def multiply(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The product of a dense weight that an adapter brings; see MakeProduct."""
        if self.make_product is None:
            raise ValueError(f"{self.members[0]} is no linear map")
        return self.make_product(weight, bias)

    def normalized(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., width] normalized with another weight [width] than the base's."""
        if self.normalize is None:
            raise ValueError(f"{self.members[0]} is no normalization")
        return self.normalize(x, weight)

    @property
    def dtype_name(self) -> str:
        """Of the compute dtype, for messages."""
        return str(self.dtype).removeprefix("torch.")

    def own_bias(self, member: int) -> torch.Tensor | None:
        """The base's own bias of one member, [out] float32 in host memory."""
        begin, end = self.columns[member]
        return None if self.bias is None else self.bias[begin:end]


class StepRows(Protocol):
    """The rows of a step that one site sees."""

    @property
    def segments(self) -> Sequence[SlotSegment]:
        """Rows of adapters, one segment a slot."""
        ...

    @property
    def has_virtual_ids(self) -> bool:
        """Whether some rows are virtual tokens, whose ids are negative."""
        ...

    @property
    def changes_inputs(self) -> bool:
        """Whether members of a site may read inputs of their own in this step."""
        ...

    def add_low_rank(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> None:
        """See `Kernels.add`."""
        ...

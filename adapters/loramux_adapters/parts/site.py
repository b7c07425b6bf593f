"""Where parts act, and what they see of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from loramux_adapters.kernels.protocol import LowRankPools, SlotSegment
from loramux_adapters.parts.rank_rows import RankRowsTable

SiteKind = Literal["linear", "embedding", "norm"]


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
    def changes_inputs(self) -> bool:
        """Whether members of a site may read inputs of their own in this step."""
        ...

    def add_low_rank(self, y: torch.Tensor, x: torch.Tensor, pools: LowRankPools) -> None:
        """See `Kernels.add`."""
        ...

"""One adapter's weights in the canonical form y = W x + B A x + bias, per module.

The scale (alpha / r or alpha / sqrt(r)) is folded into B once, in float32, so that nothing
after this point needs to know which rule a format used. Knows no file and no device layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loramux_adapters.spec import AdapterSpec


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta B A of one map y = W x.

    For an embedding, `in` is the vocabulary: A's columns are gathered by token id.
    """

    a: torch.Tensor  # [r, in], in the dtype it was uploaded in
    b: torch.Tensor  # [out, r], float32, scale folded in

    @property
    def rank(self) -> int:
        """r, the true rank."""
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """What an adapter does to one module; an absent part costs nothing.

    `bias` [out], float32, is the whole effective bias: it replaces the base's own.
    """

    low_rank: LowRank | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A whole adapter in host memory, keyed by the base's module names."""

    spec: AdapterSpec
    modules: Mapping[str, ModuleWeights]

    @property
    def nbytes(self) -> int:
        """Host bytes of all tensors."""
        tensors = [
            tensor
            for module in self.modules.values()
            for tensor in (
                *((module.low_rank.a, module.low_rank.b) if module.low_rank else ()),
                *((module.bias,) if module.bias is not None else ()),
            )
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

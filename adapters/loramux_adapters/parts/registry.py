"""Every kind of part, in the order in which they act on an output and are folded into a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.parts import (
    added_tokens,
    bias,
    bottleneck,
    dense,
    input_gain,
    kv_prefix,
    low_rank,
    magnitude,
    norm_weight,
    output_gain,
    token_rows,
    virtual_tokens,
)
from loramux_adapters.parts.part import Kind, Part

KINDS: tuple[Kind, ...] = (
    norm_weight.KIND,
    dense.KIND,
    token_rows.KIND,
    added_tokens.KIND,
    low_rank.KIND,
    input_gain.KIND,
    output_gain.KIND,
    magnitude.KIND,
    bias.KIND,
    virtual_tokens.KIND,
    kv_prefix.KIND,
    bottleneck.KIND,
)

KIND_OF: dict[type[Part], Kind] = {kind.part: kind for kind in KINDS}


def fold_parts(weight: torch.Tensor, bias: torch.Tensor, parts: Sequence[Part]) -> None:
    """Folds one module's parts into its weight [out, in] and bias [out], float32, in the order in which they act."""
    known = {KIND_OF[type(part)]: part for part in parts}
    for kind in KINDS:
        if kind in known:
            kind.fold(weight, bias, known[kind])

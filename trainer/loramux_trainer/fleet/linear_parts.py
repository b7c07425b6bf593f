"""What a member's parts at linear maps are in one step, and what each does with its own rows, forward and backward.

Gradients of parts are added where the member keeps them. Knows no frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loramux_trainer.fleet.parts import Leaf
from loramux_trainer.fleet.rows import Span


@dataclass(frozen=True, eq=False)
class Gain:
    """On the output; `own` is the base's bias where it is not scaled."""

    leaf: Leaf  # [out]
    own: torch.Tensor | None  # [out]


@dataclass(frozen=True, eq=False)
class LinearParts:
    """One member's parts at one map."""

    dense: Leaf | None  # [out, in], in place of the frozen weight
    low_rank: tuple[Leaf, Leaf] | None  # A [r, in], B [out, r] with the scale
    input_gain: Leaf | None  # [in]
    gain: Gain | None
    bias: Leaf | None  # [out], the difference to the base's own

    @property
    def is_empty(self) -> bool:
        """Whether the member leaves the map as it is."""
        leaves = (self.dense, self.low_rank, self.input_gain, self.gain, self.bias)
        return all(leaf is None for leaf in leaves)

    @property
    def rank(self) -> int:
        """Of the low rank, 0 without one."""
        return 0 if self.low_rank is None else len(self.low_rank[0].value)


@dataclass(frozen=True, eq=False)
class GroupParts:
    """One member's parts at siblings."""

    maps: tuple[LinearParts, ...]

    @property
    def acts(self) -> bool:
        """Whether there is one."""
        return not all(parts.is_empty for parts in self.maps)


Acting = Sequence[tuple[Span, GroupParts]]


def scaled_inputs(x: torch.Tensor, maps: int, acting: Acting) -> list[torch.Tensor]:
    """What each map reads: x itself where no member scales it."""
    inputs = [x] * maps
    for span, own in acting:
        for index, parts in enumerate(own.maps):
            if parts.input_gain is not None:
                if inputs[index] is x:
                    inputs[index] = x.clone()
                inputs[index][span.rows] *= parts.input_gain.value.to(x.dtype)
    return inputs


def dropout_masks(x: torch.Tensor, site: str, acting: Acting) -> list[torch.Tensor | None]:
    """Dropout masks of the spans that have one and a low rank here; siblings share theirs."""
    return [
        span.dropout.mask(site, x[span.rows])
        if span.dropout is not None and any(parts.low_rank is not None for parts in own.maps)
        else None
        for span, own in acting
    ]


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x itself without a mask."""
    return x if mask is None else x * mask


def masked_inputs(
    inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], acting: Acting
) -> Sequence[torch.Tensor]:
    """The inputs of the low ranks; siblings that read one tensor still do."""
    if all(mask is None for mask in masks):
        return inputs
    made: dict[int, torch.Tensor] = {}
    for each in inputs:
        if id(each) not in made:
            made[id(each)] = each.clone()
            for (span, _), mask in zip(acting, masks, strict=True):
                if mask is not None:
                    made[id(each)][span.rows] *= mask
    return [made[id(each)] for each in inputs]


def without_dense(gradients: Sequence[torch.Tensor], acting: Acting) -> list[torch.Tensor]:
    """Gradients of y that the frozen weights have to do with: none where a member has a weight of its own."""
    found = list(gradients)
    for span, own in acting:
        for index, parts in enumerate(own.maps):
            if parts.dense is not None:
                if found[index] is gradients[index]:
                    found[index] = gradients[index].clone()
                found[index][span.rows] = 0
    return found


def dense_back(parts: LinearParts, x: torch.Tensor, of_y: torch.Tensor, of_x: torch.Tensor | None) -> None:
    """x [n, in] and the gradient of y [n, out] of one span: adds to those of the member's own weight and of x."""
    if parts.dense is None:
        return
    if parts.dense.grad is not None:
        parts.dense.grad.addmm_(of_y.float().T, x)
    if of_x is not None:
        of_x += (of_y.float() @ parts.dense.value).to(of_x.dtype)


def low_rank_back(
    parts: LinearParts,
    z: torch.Tensor,
    of_y: torch.Tensor,
    mask: torch.Tensor | None,
    of_x: torch.Tensor | None,
) -> None:
    """z [n, in] and the gradient of y [n, out] of one span: adds to those of A, B and x [n, in]."""
    if parts.low_rank is None:
        return
    a, b = parts.low_rank
    of_y = of_y.float()
    of_shrunk = of_y @ b.value  # [n, r]
    if b.grad is not None:
        b.grad.addmm_(of_y.T, z @ a.value.T)
    if a.grad is not None:
        a.grad.addmm_(of_shrunk.T, z)
    if of_x is not None:
        if mask is None and of_x.dtype == torch.float32:
            of_x.addmm_(of_shrunk, a.value)
        else:
            of_x += masked(of_shrunk @ a.value, mask).to(of_x.dtype)

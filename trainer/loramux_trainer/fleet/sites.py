"""Embeddings, normalizations and rows of the head with gradients: the frozen module for all rows, then each member's
parts on its own.

By autograd's own operations, since little of a step's time is here. The arithmetic is that of the parts' files in
`loramux_adapters.parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.magnitude import Magnitude
from loramux_adapters.parts.norm_weight import NormWeight
from loramux_adapters.parts.token_rows import TokenRows
from loramux_adapters.parts.virtual_tokens import VirtualTokens
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.rows import Span, SpanRows, StepCell

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input, output) of a member's rows -> their output with its parts."""


def changed(
    x: torch.Tensor, y: torch.Tensor, rows: SpanRows, change_of: Callable[[Span], Change | None]
) -> torch.Tensor:
    """y [T, ...] of a module for x [T, ...], with the rows of members that change theirs; y itself where none does."""
    pieces, at = [], 0
    for span in rows.spans:
        change = change_of(span)
        if change is not None:
            pieces += [y[at : span.start], change(x[span.rows], y[span.rows])]
            at = span.stop
    return y if not pieces else torch.cat([*pieces, y[at:]])


def with_virtual_rows(table: torch.Tensor, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y [n, width], where ids [n] say so a row of `table` [V, width]: id -1 is the first virtual token."""
    picked = table[(-1 - ids).clamp(0, len(table) - 1)].to(y.dtype)
    return torch.where((ids < 0)[:, None], picked, y)


class EmbeddingSite:
    """The input embedding: low rank by token with magnitudes, trained rows of tokens, and rows of virtual tokens."""

    def __init__(self, name: str, module: nn.Embedding, cell: StepCell) -> None:
        self._name, self._cell, self._weight = name, cell, module.weight.detach()
        self._frozen = type(module).forward.__get__(module)
        self._scale: Any = getattr(module, "embed_scale", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as torch's, for models that call by keyword
        """[1, T] ids -> [1, T, hidden]."""
        rows = self._cell.tokens
        y: torch.Tensor = self._frozen(input.clamp(min=0))
        return y if rows is None else changed(input[0], y[0], rows, self._change)[None]

    def _change(self, span: Span) -> Change | None:
        return span.parts.bound(self._name, self._bind)

    def _bind(self, parts: StepParts) -> Change | None:
        low_rank, rows = parts.get(self._name, LowRank), parts.get(self._name, TokenRows)
        virtual = parts.get(self._name, VirtualTokens)
        if low_rank is None and rows is None and virtual is None:
            return None
        scale = self._scale
        factors = None
        if low_rank is not None:
            factors = (parts.leaf(low_rank.a).as_variable(), parts.leaf(low_rank.b).as_variable())
        magnitude, gain = parts.get(self._name, Magnitude), None
        if magnitude is not None:
            gain = parts.leaf(magnitude.length / self._lengths(magnitude.low_rank)).as_variable()
        table = None
        if rows is not None:
            table = (rows.ids.to(self._weight.device), parts.leaf(rows.rows).as_variable(), rows.base_share)
        virtual_rows = None if virtual is None else parts.leaf(virtual.rows).as_variable()

        def change(ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if factors is not None:
                delta = factors[0].T[ids.clamp(min=0)] @ factors[1].T
                y = y + (delta if scale is None else delta * scale).to(y.dtype)
            if gain is not None:
                y = y * gain.to(y.dtype)
            if table is not None:
                known, own, share = table
                places = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
                found = (own if scale is None else own * scale)[places].to(y.dtype)
                found = found if share is None else found + share[places].to(y.dtype) * y
                y = torch.where((known[places] == ids)[:, None], found, y)
            if virtual_rows is not None:
                y = with_virtual_rows(virtual_rows, ids, y)
            return y

        return change

    @torch.no_grad()
    def _lengths(self, low_rank: LowRank) -> torch.Tensor:
        """[hidden], of what all tokens have in one place: a constant to the gradient, as at linear maps."""
        lengths: torch.Tensor = torch.linalg.vector_norm(self._weight.float() + (low_rank.b @ low_rank.a).T, dim=0)
        return lengths


class HeadRows:
    """The output head, where the rows of some tokens are trained: their logits are computed anew."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        bias = getattr(module, "bias", None)
        self._bias: torch.Tensor | None = None if bias is None else bias.detach()

    def apply(self, hidden: torch.Tensor, logits: torch.Tensor, rows: SpanRows) -> torch.Tensor:
        """hidden [n, hidden], the head's logits [n, vocabulary] -> the same with trained rows."""
        return changed(hidden, logits, rows, self._change)

    def acts(self, span: Span) -> bool:
        """Whether a member has some."""
        return self._change(span) is not None

    def _change(self, span: Span) -> Change | None:
        return span.parts.bound(f"{self._name}:rows", self._bind)

    def _bind(self, parts: StepParts) -> Change | None:
        rows = parts.get(self._name, TokenRows)
        if rows is None:
            return None
        table, share = parts.leaf(rows.rows).as_variable(), rows.base_share
        ids = rows.ids.to(table.device)
        bias = None if self._bias is None else self._bias[ids]
        if bias is not None and share is not None:
            bias = bias * (1 - share[:, 0])

        def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            own = F.linear(x, table.to(x.dtype), None if bias is None else bias.to(x.dtype))
            own = own if share is None else own + share.T.to(y.dtype) * y[:, ids]
            return y.index_copy(1, ids, own)

        return change


class NormSite:
    """A normalization: weight and bias of the member's own."""

    def __init__(self, name: str, module: nn.Module, cell: StepCell) -> None:
        self._name, self._module, self._cell = name, module, cell
        self._frozen = type(module).forward.__get__(module)
        bias = getattr(module, "bias", None)
        self._own_bias: torch.Tensor | None = None if bias is None else bias.detach()
        self.enter: Callable[[torch.Tensor], None] | None = None  # told the input, where a sub-layer begins here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, width] -> the same; where heads are normalized each, [1, T, heads, width] or [1, heads, T, width]."""
        y: torch.Tensor = self._frozen(x)
        rows = self._cell.tokens
        if rows is None:
            return y
        if self.enter is not None:
            self.enter(x)
        if not any(self._change(span) for span in rows.spans):
            return y
        axis = 1 if x.dim() == 3 or x.shape[1] == rows.count else 2
        if x.dim() == 4 and x.shape[1] == x.shape[2]:
            raise ValueError(f"{self._name}: rows and heads cannot be told apart in a micro-batch of {rows.count}")
        moved = (x[0].movedim(axis - 1, 0), y[0].movedim(axis - 1, 0))
        return changed(*moved, rows, self._change).movedim(0, axis - 1)[None]

    def _change(self, span: Span) -> Change | None:
        return span.parts.bound(self._name, self._bind)

    def _bind(self, parts: StepParts) -> Change | None:
        weight, bias = parts.get(self._name, NormWeight), parts.get(self._name, Bias)
        if weight is None and bias is None:
            return None
        own = self._own_bias
        value = None
        if weight is not None:
            whole = weight.value
            if weight.base_share:
                whole = whole + weight.base_share * self._module.get_parameter("weight").detach().float()
            value = parts.leaf(whole).as_variable()
        delta = None
        if bias is not None:
            difference = bias.value if own is None else bias.value - (1.0 - bias.base_share) * own.float()
            delta = parts.leaf(difference).as_variable()

        def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if value is not None:
                y = self._normalized(x, value.to(y.dtype))
            return y if delta is None else y + delta.to(y.dtype)

        return change

    def _normalized(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        replaced = self._module.__dict__.pop("forward", None)  # the module's own arithmetic, not this site again
        try:
            y: torch.Tensor = functional_call(self._module, {"weight": weight}, (x,))
        finally:
            if replaced is not None:
                self._module.__dict__["forward"] = replaced
        return y

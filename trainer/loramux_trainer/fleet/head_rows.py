"""Trained rows of tokens at the output head, with gradients: on a base that ties it to the embedding they are its too.

The logits of these tokens are computed anew, by the arithmetic of `loramux_adapters.parts.token_rows`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramux_adapters.parts.token_rows import TokenRows
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.rows import Span, SpanRows
from loramux_trainer.fleet.sites import Change, changed


class HeadRowsSite:
    """`bias` [vocabulary] is the head's own."""

    def __init__(self, head: str, bias: torch.Tensor | None) -> None:
        self._head, self._bias = head, bias

    def change(self, hidden: torch.Tensor, logits: torch.Tensor, rows: SpanRows) -> torch.Tensor:
        """logits [n, vocabulary] of hidden [n, hidden] -> the same with the rows of members that train some."""
        return changed(hidden, logits, rows, self._change)

    def _change(self, span: Span) -> Change | None:
        return span.parts.bound(f"{self._head}:rows", self._bind)

    def _bind(self, parts: StepParts) -> Change | None:
        part = parts.get(self._head, TokenRows)
        if part is None:
            return None
        ids, share = part.ids, part.base_share
        own = parts.leaf(part.rows).as_variable()
        bias = None if self._bias is None else self._bias[ids].float()
        if bias is not None and share is not None:
            bias = bias * (1 - share[:, 0])

        def change(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            found = F.linear(hidden, own.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
            if share is not None:
                found = found + share.T.to(found.dtype) * logits[:, ids]
            return logits.index_copy(1, ids, found.to(logits.dtype))

        return change

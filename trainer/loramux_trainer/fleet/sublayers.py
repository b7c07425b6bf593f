"""Sub-layers with gradients: bottlenecks on the output of a layer's attention or MLP.

A sub-layer begins at the norm that reads the residual stream and ends at the output projection, as in the server.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from loramux_adapters.parts.bottleneck import Bottleneck, BoundBottleneck
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.rows import Span, StepCell
from loramux_trainer.fleet.sites import Change, changed


class SublayerSite:
    """Keeps nothing where no member of the micro-batch has a bottleneck."""

    def __init__(self, name: str, cell: StepCell) -> None:
        self._name, self._cell = name, cell
        self._residual: torch.Tensor | None = None

    def enter(self, residual: torch.Tensor) -> None:
        """The residual stream [1, T, width], from the norm on."""
        rows = self._cell.tokens
        acts = rows is not None and any(self._change(span) for span in rows.spans)
        self._residual = residual if acts else None

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The output [1, T, width] -> what is added to the residual stream."""
        rows, residual = self._cell.tokens, self._residual
        self._residual = None
        if rows is None or residual is None:
            return y
        return changed(residual[0], y[0], rows, self._change)[None]

    def reset(self) -> None:
        """Drops what a failed forward may have left behind."""
        self._residual = None

    def _change(self, span: Span) -> Change | None:
        return span.parts.bound(self._name, self._bind)

    def _bind(self, parts: StepParts) -> Change | None:
        part = parts.get(self._name, Bottleneck)
        if part is None:
            return None

        def variable(tensor: torch.Tensor) -> torch.Tensor:
            return parts.leaf(tensor).as_variable()

        before, after = (None if norm is None else variable(norm) for norm in (part.norm_before, part.norm_after))
        down = _product(variable(part.down), variable(part.down_bias))
        bound = BoundBottleneck(part.form, down, _product(variable(part.up), variable(part.up_bias)), before, after)
        return lambda residual, y: bound.output(y, residual)


def _product(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

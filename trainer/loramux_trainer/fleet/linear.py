"""Siblings of linear maps with gradients: one frozen product for the rows of all members, and each one's parts.

Computes what a server computes (`loramux_adapters.apply.group`), by the same frozen product and the same kernels:
y = output_gain * (W x' + B A dropout(x')) + bias, x' = input_gain * x. One node of autograd's graph per group: x is
kept once, and gradients of the parts are added where each member keeps its own. The frozen weight has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loramux_adapters.apply.siblings import FrozenGroup
from loramux_adapters.kernels.protocol import LowRankPools
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.input_gain import InputGain
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.magnitude import Magnitude
from loramux_adapters.parts.output_gain import OutputGain
from loramux_trainer.fleet.linear_parts import (
    Acting,
    Gain,
    GroupParts,
    LinearParts,
    dense_back,
    dropout_masks,
    low_rank_back,
    masked,
    masked_inputs,
    scaled_inputs,
    without_dense,
)
from loramux_trainer.fleet.parts import Leaf, StepParts
from loramux_trainer.fleet.rows import Span, SpanRows, StepCell


class Observer(Protocol):
    """Told what passes a group, where an initialization asks for statistics. Tensors are not to be kept or written."""

    def inputs(self, x: torch.Tensor) -> None:
        """x [T, in] of a forward."""

    def gradients(self, x: torch.Tensor, of_y: Sequence[torch.Tensor]) -> None:
        """x [T, in] and the gradient of each map's y [T, out]."""


class LinearGroup:
    """Siblings over one frozen product. The first one called computes all; the others find theirs."""

    def __init__(self, frozen: FrozenGroup, cell: StepCell) -> None:
        self.frozen, self.names, self.columns = frozen.frozen, frozen.names, frozen.columns
        self.widths = [end - begin for begin, end in frozen.columns]
        self._group, self._cell = frozen, cell
        self._squares: dict[int, torch.Tensor] = {}
        self.observer: Observer | None = None
        self._kept: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._unread = 0

    @property
    def key(self) -> str:
        """Its name: the first map's."""
        return self.names[0]

    def project(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """One map's y [..., out] for x [..., in]."""
        if self._kept is None or self._kept[0] is not x:
            self._kept = (x, self.apply(x.reshape(-1, x.shape[-1]), self._cell.tokens))
            self._unread = len(self.names)
        y = self._kept[1][member]
        self._unread -= 1
        if not self._unread:
            self._kept = None
        return y.view(*x.shape[:-1], self.widths[member])

    def apply(self, x: torch.Tensor, rows: SpanRows | None) -> tuple[torch.Tensor, ...]:
        """x [T, in] -> each map's y [T, out].

        Raises ValueError where T is not the number of rows and a member has parts here: a model may run a module on
        some of the rows (experts) that nobody trains.
        """
        acting = [] if rows is None else [(span, self.bind(span)) for span in rows.spans if self.bind(span).acts]
        if acting and rows is not None and len(x) != rows.count:
            raise ValueError(f"{self.key}: {len(x)} rows in a micro-batch of {rows.count}")
        tap = self._cell.tap if acting or self.observer is not None else None
        y = _Adapted.apply(x, tap, self, rows, acting)  # type: ignore[no-untyped-call]
        return cast(tuple[torch.Tensor, ...], y)

    def product(self, x: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The frozen product [T, all columns], each map's own input in place of x."""
        y = self.frozen.forward(x if len(inputs) > 1 else inputs[0])
        for (begin, end), own in zip(self.columns, inputs, strict=True):
            if len(inputs) > 1 and own is not x:
                y[:, begin:end] = self.frozen.forward(own)[:, begin:end]
        return y

    def product_back(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Gradients of each map's y [T, out] -> that of the input [T, in] they share."""
        return self.frozen.backward(gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), dim=1))

    def reset(self) -> None:
        """Drops what a failed forward may have left behind."""
        self._kept = None

    def bind(self, span: Span) -> GroupParts:
        """A member's parts at all maps of the group."""
        return span.parts.bound(self.key, self._bind)

    def _bind(self, parts: StepParts) -> GroupParts:
        return GroupParts(tuple(self._bind_one(parts, index) for index in range(len(self.names))))

    def _bind_one(self, parts: StepParts, member: int) -> LinearParts:
        name = self.names[member]
        low_rank, input_gain = parts.get(name, LowRank), parts.get(name, InputGain)
        gain, magnitude, bias = parts.get(name, OutputGain), parts.get(name, Magnitude), parts.get(name, Bias)
        own = self._own_bias(member)
        made: Gain | None = None
        if magnitude is not None:
            length = magnitude.length / self._row_norms(member, magnitude.low_rank)
            made = Gain(parts.leaf(length), own)
        elif gain is not None:
            made = Gain(parts.leaf(gain.gain), None if gain.with_bias else own)
        delta: Leaf | None = None
        if bias is not None:
            delta = parts.leaf(bias.value if own is None else bias.value - (1.0 - bias.base_share) * own)
        dense, weight = parts.get(name, Dense), None
        if dense is not None:
            frozen = self._group.weight(member)
            changed = dense.change.bias(own, frozen)
            if changed is not own and changed is not None:
                delta = parts.leaf(changed if own is None else changed - own)
            weight = parts.leaf(dense.change.apply(frozen))
        return LinearParts(
            weight,
            None if low_rank is None else (parts.leaf(low_rank.a), parts.leaf(low_rank.b)),
            None if input_gain is None else parts.leaf(input_gain.gain),
            made,
            delta,
        )

    def _own_bias(self, member: int) -> torch.Tensor | None:
        begin, end = self.columns[member]
        return None if self.frozen.bias is None else self.frozen.bias[begin:end].float()

    @torch.no_grad()
    def _row_norms(self, member: int, low_rank: LowRank) -> torch.Tensor:
        """Lengths [out] of the rows of W + B A, a constant to the gradient (Liu et al., 2024, section 4.3).

        From |w|^2 + 2 w (A^T b) + b (A A^T) b: no weight of the member's own is made.
        """
        weight = self._group.weight(member)
        if member not in self._squares:
            self._squares[member] = weight.square().sum(1)
        a, b = low_rank.a, low_rank.b
        shrunk = weight @ a.T  # [out, r]
        return (self._squares[member] + (b * (2 * shrunk + b @ (a @ a.T))).sum(1)).sqrt()


class _Adapted(torch.autograd.Function):
    """See the module. Saved: x, then dropout masks and outputs before a gain, in the order of `acting`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tap: torch.Tensor | None, group: LinearGroup, rows: SpanRows | None, acting: Acting
    ) -> tuple[torch.Tensor, ...]:
        """x [T, in] -> each map's [T, out]."""
        if group.observer is not None:
            group.observer.inputs(x)
        inputs = scaled_inputs(x, len(group.names), acting)
        y = group.product(x, inputs)
        _multiply_dense(y, inputs, group, acting)
        masks = dropout_masks(x, group.key, acting)
        if rows is not None:
            _add_low_rank(y, masked_inputs(inputs, masks, acting), group, rows, acting)
        before = _finish(y, group, acting)
        ctx.save_for_backward(x, *(mask for mask in masks if mask is not None), *before)
        ctx.group, ctx.acting, ctx.has_mask = group, acting, [mask is not None for mask in masks]
        ctx.first = 0 if rows is None else rows.first
        return tuple(y[:, begin:end] for begin, end in group.columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Adds the parts' gradients where they are kept; returns that of x."""
        x, *saved = ctx.saved_tensors
        group, acting = ctx.group, ctx.acting
        if group.observer is not None:
            group.observer.gradients(x, gradients)
        kept = iter(saved)
        masks = [next(kept) if has else None for has in ctx.has_mask]
        of_y = _finish_back(list(gradients), list(kept), group, acting)
        of_x: torch.Tensor | None = None
        has_input_gain = any(parts.input_gain is not None for _, own in acting for parts in own.maps)
        if has_input_gain:
            of_x = _back_through_gains(x, of_y, masks, group, acting)
        else:
            if ctx.needs_input_grad[0]:
                of_frozen = without_dense(of_y, acting)
                of_x = group.product_back([each[ctx.first :] for each in of_frozen])
                if ctx.first:
                    of_x = torch.cat([torch.zeros_like(x[: ctx.first]), of_x])
            for (span, own), mask in zip(acting, masks, strict=True):
                rows = x[span.rows].float()
                dropped = masked(rows, mask)
                shared = None if of_x is None else of_x[span.rows]
                for parts, of_one in zip(own.maps, of_y, strict=True):
                    dense_back(parts, rows, of_one[span.rows], shared)
                    low_rank_back(parts, dropped, of_one[span.rows], mask, shared)
        return of_x if ctx.needs_input_grad[0] else None, None, None, None, None


def _multiply_dense(y: torch.Tensor, inputs: Sequence[torch.Tensor], group: LinearGroup, acting: Acting) -> None:
    """Where members have a weight of their own, its product in place of the frozen one's."""
    for span, own in acting:
        for index, parts in enumerate(own.maps):
            if parts.dense is not None:
                begin, end = group.columns[index]
                bias = None if group.frozen.bias is None else group.frozen.bias[begin:end]
                y[span.rows, begin:end] = F.linear(inputs[index][span.rows], parts.dense.value.to(y.dtype), bias)


def _add_low_rank(
    y: torch.Tensor, inputs: Sequence[torch.Tensor], group: LinearGroup, rows: SpanRows, acting: Acting
) -> None:
    """All members' low ranks by the kernels, from pools that are made for this call."""
    members = {span.slot: own for span, own in acting}
    ranks = {slot: [parts.rank for parts in own.maps] for slot, own in members.items()}
    capacity = sum(max(each) for each in ranks.values())
    if not capacity:
        return
    is_even = all(min(each) == max(each) for each in ranks.values())
    make = y.new_empty if is_even else y.new_zeros
    a = make((len(group.names), capacity, group.frozen.in_features))
    b = [make((capacity, width)) for width in group.widths]
    places: list[dict[int, tuple[int, int]]] = [{} for _ in group.names]
    first = 0
    for slot, own in members.items():
        for index, parts in enumerate(own.maps):
            if parts.low_rank is not None:
                rank = ranks[slot][index]
                a[index, first : first + rank].copy_(parts.low_rank[0].value)
                b[index][first : first + rank].copy_(parts.low_rank[1].value.T)
                places[index][slot] = (first, rank)
        first += max(ranks[slot])
    rank_rows = [rows.rank_rows(place, capacity) if place else None for place in places]
    if all(each is inputs[0] for each in inputs):
        rows.add_low_rank(y, inputs[0], LowRankPools(a, b, group.columns, rank_rows))
        return
    for index, each in enumerate(inputs):
        alone = [own if other == index else None for other, own in enumerate(rank_rows)]
        rows.add_low_rank(y, each, LowRankPools(a, b, group.columns, alone))


def _finish(y: torch.Tensor, group: LinearGroup, acting: Acting) -> list[torch.Tensor]:
    """Gains and biases, in place; returns what the gains were multiplied with, for their gradients."""
    before = []
    for span, own in acting:
        for (begin, end), parts in zip(group.columns, own.maps, strict=True):
            out = y[span.rows, begin:end]
            if parts.gain is not None:
                shift = None if parts.gain.own is None else parts.gain.own.to(y.dtype)
                core = out.clone() if shift is None else out - shift
                before.append(core)
                torch.mul(core, parts.gain.leaf.value.to(y.dtype), out=out)
                if shift is not None:
                    out += shift
            if parts.bias is not None:
                out += parts.bias.value.to(y.dtype)
    return before


def _finish_back(
    gradients: list[torch.Tensor], before: list[torch.Tensor], group: LinearGroup, acting: Acting
) -> list[torch.Tensor]:
    """Gradients of y -> those of what stands before gains and biases; adds those of both."""
    cores, owned = iter(before), [False] * len(gradients)
    for span, own in acting:
        for index, parts in enumerate(own.maps):
            of_out = gradients[index][span.rows]
            if parts.bias is not None and parts.bias.grad is not None:
                parts.bias.grad.add_(of_out.float().sum(0))
            if parts.gain is not None:
                core = next(cores)
                if parts.gain.leaf.grad is not None:
                    parts.gain.leaf.grad.add_((of_out.float() * core.float()).sum(0))
                if not owned[index]:  # it may be shared with others
                    gradients[index], owned[index] = gradients[index].clone(), True
                gradients[index][span.rows] *= parts.gain.leaf.value.to(of_out.dtype)
    return gradients


def _back_through_gains(
    x: torch.Tensor,
    of_y: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    group: LinearGroup,
    acting: Acting,
) -> torch.Tensor:
    """The gradient of x, map by map, where maps read inputs of their own; adds the gradients of input gains too."""
    of_x = torch.zeros_like(x)
    of_frozen = without_dense(of_y, acting)
    for index, of_one in enumerate(of_y):
        others = [each if other == index else torch.zeros_like(each) for other, each in enumerate(of_frozen)]
        of_input = group.product_back(others)
        for (span, own), mask in zip(acting, masks, strict=True):
            parts = own.maps[index]
            gain = None if parts.input_gain is None else parts.input_gain.value
            rows = x[span.rows].float()
            own_input = rows if gain is None else rows * gain
            dense_back(parts, own_input, of_one[span.rows], of_input[span.rows])
            low_rank_back(parts, masked(own_input, mask), of_one[span.rows], mask, of_input[span.rows])
            if parts.input_gain is not None:
                if parts.input_gain.grad is not None:
                    parts.input_gain.grad.add_((of_input[span.rows].float() * rows).sum(0))
                of_input[span.rows] *= parts.input_gain.value.to(x.dtype)
        of_x += of_input
    return of_x

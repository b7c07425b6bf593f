"""Adapted modules: a frozen map, the rank rows of many adapters beside it, and the step's batch that joins them.

Siblings over the same input (q, k, v; gate, up) form one `SiteGroup`: the first call computes all of them, the others
take their columns. Knows slots and layouts, not who owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from loramux_adapters.apply.batch import AdapterBatch, Layout, SlotSegment, StepCell
from loramux_adapters.frozen import FrozenLinear
from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.protocol import Kernels

Rows = Literal["tokens", "logits"]


class BiasSlots:
    """Per slot the difference between an adapter's whole bias and the base's own, [out] in the compute dtype."""

    def __init__(self) -> None:
        self.deltas: Mapping[int, torch.Tensor] = {}  # replaced as a whole, never mutated

    def put(self, slot: int, delta: torch.Tensor) -> None:
        """Sets a slot's delta."""
        self.deltas = {**self.deltas, slot: delta}

    def drop(self, slot: int) -> None:
        """Forgets a slot's delta, if it has one."""
        self.deltas = {key: value for key, value in self.deltas.items() if key != slot}

    def add_to(self, y: torch.Tensor, segments: Sequence[SlotSegment]) -> None:
        """Adds each segment's delta to its rows of y [T, out], in place."""
        if not self.deltas:
            return
        for segment in segments:
            delta = self.deltas.get(segment.slot)
            if delta is not None:
                y[segment.start : segment.stop] += delta


class SiteGroup:
    """One frozen product shared by `members`, each with rank pools of `capacity` rows.

    a: [M, C, in]; b: per member [C, out]; both in the compute dtype, zero where free.
    """

    def __init__(
        self,
        frozen: FrozenLinear,
        members: Sequence[str],
        outs: Sequence[int],
        cell: StepCell,
        kernels: Kernels,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: Rows = "tokens",
    ) -> None:
        self.frozen, self.members, self.rows = frozen, tuple(members), rows
        ends = [sum(outs[: index + 1]) for index in range(len(outs))]
        self.columns = tuple((end - out, end) for end, out in zip(ends, outs, strict=True))
        self.a = torch.zeros(len(members), capacity, frozen.in_features, dtype=dtype, device=device)
        self.b = [torch.zeros(capacity, out, dtype=dtype, device=device) for out in outs]
        empty = Layout({}, capacity, device)
        self.layouts = [empty for _ in members]
        self.biases = [BiasSlots() for _ in members]
        self._cell, self._kernels = cell, kernels
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unread = 0

    @property
    def key(self) -> str:
        """Name of the group: its first member's."""
        return self.members[0]

    def project(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """One member's y [..., out] for x [..., in]; siblings called with the same x share one computation."""
        if self._kept is None or self._kept[0] is not x:
            self._kept = (x, self._forward(x.reshape(-1, x.shape[-1])))
            self._unread = len(self.members)
        y = self._kept[1]
        self._unread -= 1
        if not self._unread:
            self._kept = None
        begin, end = self.columns[member]
        return y[:, begin:end].view(*x.shape[:-1], end - begin)

    def forget(self) -> None:
        """Drops what a failed forward may have left behind."""
        self._kept = None

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self._cell.batch
        if batch is None:
            return self.frozen.forward(x)
        if batch.dense is not None and self.key in batch.dense.weights:
            return batch.dense.weights[self.key].forward(x)
        y = self.frozen.forward(x)
        if batch.dense is None:
            self._add_adapters(y, x, batch)
        return y

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, batch: AdapterBatch) -> None:
        row_map = batch.tokens if self.rows == "tokens" else batch.logits
        if not row_map.segments:
            return
        plans = [row_map.plan(layout) for layout in self.layouts]
        if any(plan is not None for plan in plans):
            self._kernels.add_low_rank(y, x, self.a, self.b, self.columns, plans)
        for (begin, end), bias in zip(self.columns, self.biases, strict=True):
            bias.add_to(y[:, begin:end], row_map.segments)


class AdaptedLinear(nn.Module):
    """Stands where a Linear, Linear4bit or Conv1D stood; one member of a SiteGroup."""

    def __init__(self, group: SiteGroup, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member
        self.in_features = group.frozen.in_features
        begin, end = group.columns[member]
        self.out_features = end - begin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.group.project(x, self.member)


class AdaptedEmbedding(nn.Module):
    """An embedding with low-rank deltas: each adapter's A is kept transposed, so that ids gather its rows.

    A frozen embedding may scale its output (Gemma); the delta is scaled alike, as PEFT does.
    """

    def __init__(self, frozen: nn.Embedding, cell: StepCell) -> None:
        super().__init__()
        self.frozen, self._cell = frozen, cell
        self.slots: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = {}  # slot -> (A^T [vocab, r], B^T [r, hidden])

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table [vocab, hidden]."""
        return self.frozen.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as torch's, for models that call by keyword
        """[1, T] ids -> [1, T, hidden]."""
        ids = input
        y: torch.Tensor = self.frozen(ids)
        batch = self._cell.batch
        if batch is None or not self.slots:
            return y
        flat, rows = ids.reshape(-1), y.reshape(-1, y.shape[-1])
        for start, stop, slot in batch.tokens.segments:
            if slot in self.slots:
                a, b = self.slots[slot]
                rows[start:stop] += self._delta(a[flat[start:stop]], b)
        return rows.view_as(y)

    def _delta(self, gathered: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        delta = invariant.linear(gathered.float(), b.float().T)
        scale = getattr(self.frozen, "embed_scale", None)
        return (delta if scale is None else delta * scale).to(b.dtype)

    def put(self, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Sets a slot's factors: a [vocab, r], b [r, hidden]."""
        self.slots = {**self.slots, slot: (a, b)}

    def drop(self, slot: int) -> None:
        """Forgets a slot's factors, if it has any."""
        self.slots = {key: value for key, value in self.slots.items() if key != slot}


class AdaptedNorm(nn.Module):
    """A normalization whose bias adapters may replace."""

    def __init__(self, frozen: nn.Module, cell: StepCell) -> None:
        super().__init__()
        self.frozen, self._cell = frozen, cell
        self.bias_slots = BiasSlots()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, width] -> [1, T, width]."""
        y: torch.Tensor = self.frozen(x)
        batch = self._cell.batch
        if batch is not None and self.bias_slots.deltas:
            self.bias_slots.add_to(y.view(-1, y.shape[-1]), batch.tokens.segments)
        return y

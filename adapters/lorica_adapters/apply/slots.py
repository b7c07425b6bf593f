"""The device side of slots: writes an adapter's weights into the rank rows it was given, and binds them to its slot.

`write` may run on a loader thread while steps run, because rows not bound to a slot are selected by nobody; `bind` and
`unbind` belong to the engine thread, between steps. Who gets which rows is decided by `lorica_adapters.residency`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorica_adapters.apply.batch import Layout
from lorica_adapters.apply.group import BiasSlots, SiteGroup
from lorica_adapters.apply.inject import AdaptedModel
from lorica_adapters.errors import AdapterIncompatible
from lorica_adapters.weights import AdapterWeights, LowRank, ModuleWeights

Rows = Mapping[str, tuple[int, int]]
"""Module name -> (first rank row, number of rows)."""


class SlotTensors:
    """Slots of one adapted model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._bound: dict[int, Rows] = {}
        self._extras: dict[int, AdapterWeights] = {}  # written, with parts that live outside the rank rows
        self._layouts: dict[tuple[tuple[int, int, int], ...], Layout] = {}

    def extra_bytes(self, weights: AdapterWeights) -> int:
        """Device bytes outside the rank rows: embedding factors and biases."""
        size = self._adapted.base.compute_dtype.itemsize
        total = 0
        for name, module in weights.modules.items():
            if name in self._adapted.embeddings and module.low_rank is not None:
                total += (module.low_rank.a.numel() + module.low_rank.b.numel()) * size
            if module.bias is not None:
                total += module.bias.numel() * size
        return total

    def write(self, slot: int, weights: AdapterWeights, rows: Rows) -> None:
        """Casts and copies the low-rank factors; rank rows beyond the true rank become zero.

        Raises AdapterIncompatible where a value is not finite in the compute dtype.
        """
        for name, module in weights.modules.items():
            if name in self._adapted.linears and module.low_rank is not None:
                group, member = self._adapted.linears[name]
                _write_rows(group, member, name, module.low_rank, rows[name])
        self._extras[slot] = weights

    def bind(self, slot: int, rows: Rows) -> None:
        """Makes a written slot usable from the next step on."""
        weights = self._extras.pop(slot)
        self._bound[slot] = rows
        self._change_layouts(slot, rows)
        for name, module in weights.modules.items():
            self._bind_extras(slot, name, module)

    def unbind(self, slot: int) -> None:
        """Takes a slot out of use; its rows may be given to another from now on."""
        rows = self._bound.pop(slot)
        self._change_layouts(slot, dict.fromkeys(rows))
        for group in self._adapted.groups:
            for bias in group.biases:
                bias.drop(slot)
        for embedding in self._adapted.embeddings.values():
            embedding.drop(slot)
        for norm in self._adapted.norms.values():
            norm.bias_slots.drop(slot)

    def _change_layouts(self, slot: int, rows: Mapping[str, tuple[int, int] | None]) -> None:
        known: dict[tuple[Layout, tuple[int, int] | None], Layout] = {}
        for name, place in rows.items():
            group, member = self._adapted.linears[name]
            old = group.layouts[member]
            if (old, place) not in known:
                ranges = {key: value for key, value in old.ranges.items() if key != slot}
                if place is not None:
                    ranges[slot] = place
                known[old, place] = self._layout(ranges)
            group.layouts[member] = known[old, place]
        in_use = {layout for group in self._adapted.groups for layout in group.layouts}
        self._layouts = {key: layout for key, layout in self._layouts.items() if layout in in_use}

    def _layout(self, ranges: Mapping[int, tuple[int, int]]) -> Layout:
        key = tuple(sorted((slot, row, count) for slot, (row, count) in ranges.items()))
        if key not in self._layouts:
            self._layouts[key] = Layout(ranges, self._adapted.capacity, self._adapted.base.device)
        return self._layouts[key]

    def _bind_extras(self, slot: int, name: str, module: ModuleWeights) -> None:
        adapted, dtype, device = self._adapted, self._adapted.base.compute_dtype, self._adapted.base.device
        if name in adapted.embeddings and module.low_rank is not None:
            a = module.low_rank.a.T.to(device=device, dtype=dtype).contiguous()
            b = module.low_rank.b.T.to(device=device, dtype=dtype).contiguous()
            adapted.embeddings[name].put(slot, a, b)
        if module.bias is None:
            return
        bias = module.bias.to(device)
        if name in adapted.linears:
            group, member = adapted.linears[name]
            begin, end = group.columns[member]
            own = None if group.frozen.bias is None else group.frozen.bias[begin:end]
            _put_bias(group.biases[member], slot, bias, own, dtype)
        else:
            norm = adapted.norms[name]
            _put_bias(norm.bias_slots, slot, bias, norm.frozen.get_parameter("bias"), dtype)


def _put_bias(slots: BiasSlots, slot: int, bias: torch.Tensor, own: torch.Tensor | None, dtype: torch.dtype) -> None:
    slots.put(slot, (bias if own is None else bias - own.float()).to(dtype))


def _write_rows(group: SiteGroup, member: int, name: str, low_rank: LowRank, place: tuple[int, int]) -> None:
    row, rows = place
    a, b = group.a[member, row : row + rows], group.b[member][row : row + rows]
    a[: low_rank.rank].copy_(low_rank.a)
    b[: low_rank.rank].copy_(low_rank.b.T)
    a[low_rank.rank :].zero_()
    b[low_rank.rank :].zero_()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterIncompatible(
            f"{name}: the scaled weights are not finite in {str(a.dtype).removeprefix('torch.')}",
            subject=name,
            remedy="serve with --dtype float32, or train with a smaller alpha / r",
        )

"""The device side of slots: writes an adapter's weights into the rank rows it was given, and binds them to its slot.

`write` may run on a loader thread while steps run, because rows not bound to a slot are selected by nobody; `bind` and
`unbind` belong to the engine thread, between steps. Who gets which rows is decided by `loramux_adapters.residency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loramux_adapters.apply.batch import Layout
from loramux_adapters.apply.group import SiteGroup
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.weights import AdapterWeights, LowRank

Rows = Mapping[str, tuple[int, int]]
"""Module name -> (first rank row, number of rows)."""


@dataclass(frozen=True, eq=False)
class _Extras:
    """Parts outside the rank rows, on the device: embedding factors (A^T, B^T) and bias deltas, by module name."""

    embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)


class SlotTensors:
    """Slots of one adapted model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._bound: dict[int, Rows] = {}
        self._extras: dict[int, _Extras] = {}  # of slots written and not yet bound
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
        """Casts and copies all parts to the device; rank rows beyond the true rank become zero.

        Raises AdapterIncompatible where a value is not finite in the compute dtype; no such value reaches a rank row.
        """
        extras = _Extras()
        for name, module in weights.modules.items():
            if module.low_rank is not None and name in self._adapted.linears:
                group, member = self._adapted.linears[name]
                _write_rows(group, member, name, module.low_rank, rows[name])
            elif module.low_rank is not None:
                extras.embeddings[name] = self._embedding_factors(name, module.low_rank)
            if module.bias is not None:
                extras.biases[name] = self._bias_delta(name, module.bias)
        self._extras[slot] = extras

    def bind(self, slot: int, rows: Rows) -> None:
        """Makes a written slot usable from the next step on."""
        extras = self._extras.pop(slot)
        self._bound[slot] = rows
        self._change_layouts(slot, rows)
        for name, (a, b) in extras.embeddings.items():
            self._adapted.embeddings[name].put(slot, a, b)
        for name, delta in extras.biases.items():
            if name in self._adapted.linears:
                group, member = self._adapted.linears[name]
                group.biases[member].put(slot, delta)
            else:
                self._adapted.norms[name].bias_slots.put(slot, delta)

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

    def _embedding_factors(self, name: str, low_rank: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        base = self._adapted.base
        a, b = (factor.T.to(device=base.device, dtype=base.compute_dtype) for factor in (low_rank.a, low_rank.b))
        return _finite(name, a).contiguous(), _finite(name, b).contiguous()

    def _bias_delta(self, name: str, bias: torch.Tensor) -> torch.Tensor:
        """What to add where the base has already added its own bias, in the compute dtype."""
        base = self._adapted.base
        if name in self._adapted.linears:
            group, member = self._adapted.linears[name]
            begin, end = group.columns[member]
            own = None if group.frozen.bias is None else group.frozen.bias[begin:end]
        else:
            own = self._adapted.norms[name].frozen.get_parameter("bias")
        bias = bias.to(base.device)
        return _finite(name, (bias if own is None else bias - own.float()).to(base.compute_dtype))


def _write_rows(group: SiteGroup, member: int, name: str, low_rank: LowRank, place: tuple[int, int]) -> None:
    row, rows = place
    a, b = group.a[member, row : row + rows], group.b[member][row : row + rows]
    # Cast and checked aside: in a pool product a foreign rank row of B is multiplied by zero, and 0 * inf is NaN.
    a[: low_rank.rank].copy_(_finite(name, low_rank.a.to(a)))
    b[: low_rank.rank].copy_(_finite(name, low_rank.b.T.to(b)))
    a[low_rank.rank :].zero_()
    b[low_rank.rank :].zero_()


def _finite(name: str, cast: torch.Tensor) -> torch.Tensor:
    """`cast` itself. Raises AdapterIncompatible where a value is not finite."""
    if not torch.isfinite(cast).all():
        raise AdapterIncompatible(
            f"{name}: the scaled weights are not finite in {str(cast.dtype).removeprefix('torch.')}",
            subject=name,
            remedy="serve with --dtype float32, or train with a smaller alpha / r",
        )
    return cast

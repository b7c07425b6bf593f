"""The device side of slots: writes an adapter's parts to the sites they act at, and binds them to its slot.

`write` may run on a loader thread while steps run, because what is not bound to a slot is read by nobody; `bind` and
`unbind` belong to the engine thread, between steps. Who gets which rank rows is decided by
`loramux_adapters.residency`. Knows no kind of part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.parts.part import Part, SiteParts
from loramux_adapters.parts.registry import KIND_OF
from loramux_adapters.weights import AdapterWeights

RankRanges = Mapping[str, tuple[int, int]]
"""Module name -> (first rank row, number of rows)."""


class SlotTensors:
    """Slots of one adapted model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._touched: dict[int, tuple[SiteParts[Any], ...]] = {}  # of slots written or bound

    def cost(self, weights: AdapterWeights) -> tuple[Mapping[str, int], int]:
        """(rank rows by module, device bytes beside them). Raises AdapterIncompatible."""
        rank_rows: dict[str, int] = {}
        nbytes = 0
        for name, _, part, parts in self._placed(weights):
            cost = parts.cost(part)
            nbytes += cost.nbytes
            if cost.rank_rows:
                rank_rows[name] = rank_rows.get(name, 0) + cost.rank_rows
        return rank_rows, nbytes

    def write(self, slot: int, weights: AdapterWeights, rank_rows: RankRanges) -> None:
        """Casts and copies all parts to the device.

        Raises AdapterIncompatible where a value is not finite in the compute dtype; no such value reaches the device.
        """
        prepared = [
            (name, member, parts, parts.prepare(member, part)) for name, member, part, parts in self._placed(weights)
        ]
        self._touched[slot] = tuple(dict.fromkeys(parts for _, _, parts, _ in prepared))
        try:
            for name, member, parts, tensors in prepared:
                parts.write(slot, member, tensors, rank_rows.get(name))
        except BaseException:
            self.unbind(slot)  # or what was written so far would count for the next adapter of this slot
            raise
        self._adapted.slot_kinds[slot] = frozenset(
            KIND_OF[type(part)] for module in weights.modules.values() for part in module.parts
        )

    def bind(self, slot: int, rank_rows: RankRanges) -> None:
        """Makes a written slot usable from the next step on."""
        for parts in self._touched[slot]:
            parts.bind(slot)

    def unbind(self, slot: int) -> None:
        """Takes a slot out of use; its rows may be given to another from now on."""
        for parts in self._touched.pop(slot, ()):
            parts.unbind(slot)
        self._adapted.slot_kinds.pop(slot, None)

    def _placed(self, weights: AdapterWeights) -> Iterator[tuple[str, int, Part, SiteParts[Any]]]:
        """Every part with its module's name, its member of the site, and where it goes."""
        for name, module in weights.modules.items():
            at, member = self._adapted.sites[name]
            for part in module.parts:
                yield name, member, part, at.of(type(part))

"""The device side of slots: copies an adapter's parts to the sites they act at, and binds them to its slot.

`prepare` touches host memory only and may run on any thread; the rest belongs to the owner of the device, between two
steps. Who gets which rank rows is decided by `loramux_adapters.residency`. Knows no kind of part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.binding import RankRanges
from loramux_adapters.parts.part import Kind, Part, SiteParts
from loramux_adapters.parts.registry import KIND_OF
from loramux_adapters.weights import AdapterWeights


@dataclass(frozen=True, eq=False)
class _PreparedPart:
    name: str  # of its module
    member: int
    part: Part
    parts: SiteParts[Any]  # where it goes
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Copied, or read of the base."""
        copied = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        return copied + int(self.parts.work(self.member, self.part))


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter's tensors as the device will hold them, still in host memory; pinned for a CUDA device."""

    digest: str
    kinds: frozenset[Kind]
    vocabulary: int  # 0: the base's
    parts: tuple[_PreparedPart, ...]


class SlotTensors:
    """Slots of one adapted model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._touched: dict[int, tuple[SiteParts[Any], ...]] = {}  # of slots copied to, or bound

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

    def prepare(self, weights: AdapterWeights) -> PreparedAdapter:
        """Casts all parts, so that nothing but copies is left for the device.

        Raises AdapterIncompatible where a value is not finite in the compute dtype; no such value reaches the device.
        """
        pinned = self._adapted.base.device.type == "cuda"
        prepared = []
        for name, member, part, parts in self._placed(weights):
            tensors = parts.prepare(member, part)
            if pinned:
                tensors = tuple(tensor.pin_memory() for tensor in tensors)
            prepared.append(_PreparedPart(name, member, part, parts, tensors))
        kinds = frozenset(KIND_OF[type(part)] for module in weights.modules.values() for part in module.parts)
        return PreparedAdapter(weights.spec.digest, kinds, weights.spec.vocabulary, tuple(prepared))

    def copy(self, slot: int, adapter: PreparedAdapter, rank_ranges: RankRanges) -> Iterator[int]:
        """Copies part by part to rank rows that nobody uses; yields the bytes of each.

        A copy that does not come to its end, for an error or because nobody goes on, needs an `unbind`: what it left
        would count for the slot's next adapter.
        """
        self._touched[slot] = tuple(dict.fromkeys(part.parts for part in adapter.parts))
        for part in adapter.parts:
            part.parts.write(slot, part.member, part.part, part.tensors, rank_ranges.get(part.name))
            yield part.nbytes

    def bind(self, slot: int, adapter: PreparedAdapter) -> None:
        """Makes a slot whose copy has ended usable from the next step on."""
        for parts in self._touched[slot]:
            parts.bind(slot)
        if adapter.vocabulary:
            self._adapted.slot_vocabularies[slot] = adapter.vocabulary
        self._adapted.slot_kinds[slot] = adapter.kinds

    def unbind(self, slot: int) -> None:
        """Takes a slot out of use; its rank rows may be given to another from now on."""
        for parts in self._touched.get(slot, ()):
            parts.unbind(slot)
        self._touched.pop(slot, None)  # last: what met no memory is called again
        self._adapted.slot_kinds.pop(slot, None)
        self._adapted.slot_vocabularies.pop(slot, None)

    def _placed(self, weights: AdapterWeights) -> Iterator[tuple[str, int, Part, SiteParts[Any]]]:
        """Every part with its module's name, its member of the site, and where it goes."""
        for name, module in weights.modules.items():
            at, member = self._adapted.sites[name]
            for part in module.parts:
                yield name, member, part, at.of(type(part))

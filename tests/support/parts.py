"""Parts at work on one injected model: slots are filled with parts made by a test, and single modules are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loramux_adapters.apply.batch import AdapterBatch, RowMap
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.merge import merge
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import load_base
from loramux_adapters.binding import RankRanges
from loramux_adapters.kernels.gathered import GatheredKernels
from loramux_adapters.parts.part import Part
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.weights import AdapterWeights, ModuleWeights
from support.checkpoints import save_checkpoint, wide_model

_CAPACITY = 64
_SPEC = AdapterSpec("0" * 64, "lora", None, False, {}, frozenset(), 0)


def fill_slot(slots: SlotTensors, slot: int, weights: AdapterWeights, rank_ranges: RankRanges) -> None:
    """Prepares, copies and binds."""
    adapter = slots.prepare(weights)
    for _ in slots.copy(slot, adapter, rank_ranges):
        pass
    slots.bind(slot, adapter)


class PartsBench:
    """A small model with biases on q, k and v (Qwen2), injected; computes in `dtype`."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, architecture: str = "qwen2") -> None:
        checkpoint = save_checkpoint(wide_model(architecture), directory / "base")
        self.adapted = inject(load_base(checkpoint, compute_dtype=dtype), capacity=_CAPACITY)
        self.slots = SlotTensors(self.adapted)
        self._table = SlotTable(self.adapted.linears, _CAPACITY, 8, 1 << 24)

    def weights(self, parts: Mapping[str, Sequence[Part]], digest: str = "0" * 64) -> AdapterWeights:
        """An adapter of these parts, by module name."""
        modules = {name: ModuleWeights(tuple(each)) for name, each in parts.items()}
        return AdapterWeights(replace(_SPEC, digest=digest), modules)

    def bind(self, parts: Mapping[str, Sequence[Part]]) -> int:
        """The slot of a new adapter of these parts."""
        weights = self.weights(parts)
        ranks, nbytes = self.slots.cost(weights)
        taken = self._table.try_take(self._table.needs(ranks), nbytes)
        assert taken is not None
        slot, rows = taken
        fill_slot(self.slots, slot, weights, rows)
        return slot

    def free(self, slot: int) -> None:
        """Takes an adapter out of use."""
        self.slots.unbind(slot)
        self._table.free(slot)

    def run(self, name: str, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """What a module gives for x [T, in] when row t is of slot `slots[t]` (-1: the base)."""
        rows = [RowMap(slots, GatheredKernels(), torch.device("cpu"), self.adapted.slot_kinds) for _ in range(2)]
        with torch.inference_mode(), self.adapted.cell.running(AdapterBatch(*rows)):
            y: torch.Tensor = self.adapted.model.get_submodule(name)(x[None])[0]
        self.adapted.reset()
        return y

    def run_merged(self, name: str, x: torch.Tensor, parts: Mapping[str, Sequence[Part]]) -> torch.Tensor:
        """The same from merged weights, for rows that are all of one adapter."""
        merged = merge(self.adapted, self.weights(parts))
        rows = RowMap([], GatheredKernels(), torch.device("cpu"))
        with torch.inference_mode(), self.adapted.cell.running(AdapterBatch(rows, rows, merged)):
            y: torch.Tensor = self.adapted.model.get_submodule(name)(x[None])[0]
        self.adapted.reset()
        return y

    def frozen(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [out, in], bias [out], zero where there is none) of a linear map, float64."""
        group, member = self.adapted.linears[name]
        begin, end = group.columns[member]
        weight = group.frozen.dequantize(torch.float32)[begin:end].double()
        bias = group.frozen.bias
        return weight, torch.zeros(end - begin).double() if bias is None else bias[begin:end].double()


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale

"""C3A: the change of a weight is of circulant blocks, each of one row (Chen et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Patterned, Shape
from loramux_adapters.formats.peft.name_keys import DottedKeys
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class AddCirculants(WeightChange):
    """W and blocks whose row i is the first one shifted by i to the right. Takes two W beside it, and the places of
    one block."""

    rows: torch.Tensor  # [out / b, in / b, b], float32, scaled

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        each = torch.arange(self.rows.shape[-1], device=weight.device)
        blocks = self.rows[:, :, (each - each[:, None]) % len(each)]  # [out / b, in / b, b, b]
        return weight.add_(blocks.transpose(1, 2).reshape(weight.shape))


@dataclass(frozen=True)
class C3aTarget(ModuleTarget):
    """One module."""

    block: int

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"rows": (out // self.block, wide // self.block, self.block)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        return (Dense(AddCirculants(tensors["rows"].float() / self.size[1]), *self.size),)


@dataclass(frozen=True)
class C3aTuner(ModuleTuner):
    """See the module."""

    peft_type = "C3A"
    kind = "c3a"
    marker = ".c3a_"
    keys = ConfigKeys(
        applied=(SELECTION_KEYS - {"exclude_modules"}) | {"block_size", "block_size_pattern"},
        ignorable=frozenset({"init_weights"}),
    )
    endings: ClassVar = {"rows": ".c3a_kernel"}

    block: int
    blocks: Mapping[str, int]

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"block": config.rank("block_size", 256), "blocks": config.ranks("block_size_pattern")}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        blocks = Patterned(self.block, self.blocks, "block_size_pattern", budget, DottedKeys)
        targets = {}
        for name, module in modules.items():
            block = blocks.of(name)
            if module.in_features % block or module.out_features % block:
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: block_size {block} does not divide the sizes of {quote(name)}",
                    subject=f"{CONFIG_FILE}: block_size",
                    remedy="upload an adapter made for this base",
                )
            targets[name] = C3aTarget(module, block)
        return Targets(targets)

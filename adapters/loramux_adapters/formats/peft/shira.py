"""SHiRA: some weights of a module are trained, at positions that the file has (Bhardwaj et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.positions import add_at, check_fits, whole_numbers
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import SORT, Work, work_of
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class ShiraTarget(ModuleTarget):
    """One module, of which `count` weights are trained."""

    count: int

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"values": (self.count,), "indices": (2, self.count)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: positions are sorted."""
        return work_of(3 * self.count, reading=SORT * self.count, scratch=48 * self.count)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        rows, columns = (
            whole_numbers(each, below, self.module.name, "shira_indices")
            for each, below in zip(tensors["indices"], self.size, strict=True)
        )
        return (Dense(add_at(rows * wide + columns, tensors["values"]), out, wide),)


@dataclass(frozen=True)
class ShiraTuner(ModuleTuner):
    """See the module."""

    peft_type = "SHIRA"
    kind = "shira"
    marker = ".shira_"
    keys = ConfigKeys(
        applied=frozenset({"r", "target_modules"}),
        # How the positions were chosen.
        ignorable=frozenset({"fan_in_fan_out", "init_weights", "mask_type", "random_seed"}),
    )
    smaller = "train fewer positions, or adapt fewer modules"
    endings: ClassVar = {"values": ".shira_weight", "indices": ".shira_indices"}
    index_roles = frozenset({"indices"})

    r: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"r": config.rank("r", 32)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """As many weights as a LoRA of rank r has."""
        targets = {}
        for name, module in modules.items():
            count = self.r * (module.in_features + module.out_features)
            check_fits("r", count, module.in_features * module.out_features, name)
            targets[name] = ShiraTarget(module, count)
        return Targets(targets)

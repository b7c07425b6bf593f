"""BEFT: a vector is added to a module's outputs, whether it has a bias of its own or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import ConfigKeys
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class BeftTarget(ModuleTarget):
    """One module."""

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"vector": (1, self.size[0])}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        return (Bias(tensors["vector"].float()[0], base_share=1.0),)


@dataclass(frozen=True)
class BeftTuner(ModuleTuner):
    """See the module."""

    peft_type = "BEFT"
    kind = "beft"
    marker = ".beft_"
    keys = ConfigKeys(
        applied=frozenset({"target_modules"}),
        ignorable=frozenset({"init_weights"}),
    )
    endings: ClassVar = {"vector": ".beft_bias"}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: BeftTarget(module) for name, module in modules.items()})

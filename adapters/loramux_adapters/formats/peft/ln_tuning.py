"""LN tuning: the weights and biases of normalizations, trained whole (Zhao et al., 2024)."""

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
from loramux_adapters.parts.norm_weight import NormWeight
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class LnTarget(ModuleTarget):
    """One normalization."""

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        width = (self.module.out_features,)
        return {"weight": width, **({"norm_bias": width} if self.module.has_bias else {})}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        weight = NormWeight(tensors["weight"].float())
        return (weight, Bias(tensors["norm_bias"].float())) if self.module.has_bias else (weight,)


@dataclass(frozen=True)
class LnTuner(ModuleTuner):
    """See the module."""

    peft_type = "LN_TUNING"
    kind = "ln tuning"
    marker = ".ln_tuning_layers"
    keys = ConfigKeys(applied=frozenset({"exclude_modules", "target_modules"}))
    endings: ClassVar = {"weight": ".ln_tuning_layers.weight", "norm_bias": ".ln_tuning_layers.bias"}
    adaptable = ("norm",)

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: LnTarget(module) for name, module in modules.items()})

"""AdaLoRA: B (A * E) at a rank of each module's own (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft import lora
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class AdaLoraTarget(ModuleTarget):
    """The rank is the file's: what training pruned is not in it; the scale is that of the rank it began with."""

    alpha: float
    init_r: int

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return [self.alpha.hex(), self.init_r]

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return (*found.get("a", ()), 0)[0]

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        rank, (out, wide) = self.rank(found), self.size
        return {"a": (rank, wide), "b": (out, rank), "e": (rank, 1)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """A module that was pruned to nothing has none."""
        rank = len(tensors["a"])
        if not rank:
            return ()
        a = tensors["a"].float() * tensors["e"].float()
        # PEFT divides by the number of ranks before any was pruned, plus this.
        scale = (self.alpha if self.alpha > 0 else rank) / (self.init_r + 1e-5)
        return (LowRank(a, tensors["b"].float() * scale),)


@dataclass(frozen=True)
class AdaLoraTuner(ModuleTuner):
    """See the module."""

    peft_type = "ADALORA"
    kind = "adalora"
    marker = ".lora_"
    keys = ConfigKeys(
        applied=lora.KEYS.applied - {"use_dora", "lora_bias"} | {"init_r"},
        refused={**lora.KEYS.refused, "use_dora": "DoRA adapters", "lora_bias": "biases on lora_B"},
        ignorable=lora.KEYS.ignorable
        | {"beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"},
    )
    endings: ClassVar = {"a": ".lora_A", "b": ".lora_B", "e": ".lora_E"}
    biases = ("none", "all", "lora_only")
    may_be_empty = True

    alpha: float
    init_r: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner. AdaLoRA takes neither its scale from r nor rank-stabilized ones."""
        return {"alpha": config.number("lora_alpha", 8), "init_r": config.rank("init_r", 12)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: AdaLoraTarget(module, self.alpha, self.init_r) for name, module in modules.items()})

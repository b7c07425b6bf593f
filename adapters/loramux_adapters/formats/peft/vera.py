"""VeRA: two random matrices that all modules share, scaled by vectors of each (Kopiczko et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape, check_projection
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class VeraTarget(ModuleTarget):
    """One module's corner of the shared matrices."""

    r: int

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"lambda_b": (self.size[0],), "lambda_d": (self.r,)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        a = tensors["lambda_d"].float()[:, None] * tensors["shared_a"][:, :wide].float()
        return (LowRank(a, tensors["lambda_b"].float()[:, None] * tensors["shared_b"][:out].float()),)


@dataclass(frozen=True)
class VeraTuner(ModuleTuner):
    """See the module."""

    peft_type = "VERA"
    kind = "vera"
    marker = ".vera_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"r", "save_projection"},
        ignorable=frozenset({"d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "vera_dropout"}),
    )
    endings: ClassVar = {"lambda_b": ".vera_lambda_b", "lambda_d": ".vera_lambda_d"}
    shared_names: ClassVar = {"shared_a": "base_model.vera_A", "shared_b": "base_model.vera_B"}

    r: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        check_projection(config)
        return {"r": config.rank("r", 256)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """The shared matrices are as large as the largest module."""
        widest = max(module.in_features for module in modules.values())
        highest = max(module.out_features for module in modules.values())
        shared = {"shared_a": (self.r, widest), "shared_b": (highest, self.r)}
        return Targets({name: VeraTarget(module, self.r) for name, module in modules.items()}, shared)

"""PVeRA: VeRA whose middle is drawn from a distribution while it is trained, and is its mean when it serves
(Fillioux et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTuner, Shape, check_projection
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.vera import VeraTarget
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class PveraTarget(VeraTarget):
    """One module. The second half of what the file has of the middle is the distribution's width."""

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"lambda_b": (self.size[0],), "lambda_d": (2 * self.r,)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        mean = {role: tensors[role][: self.r] for role in ("lambda_d", "shared_a")}
        return super().parts({**tensors, **mean})


@dataclass(frozen=True)
class PveraTuner(ModuleTuner):
    """See the module."""

    peft_type = "PVERA"
    kind = "pvera"
    marker = ".pvera_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"r", "save_projection"},
        refused={
            "sample_at_inference": "answers that are drawn anew each time",
        },
        ignorable=frozenset(
            {"d_initial", "fan_in_fan_out", "generator_seed", "init_weights", "projection_prng_key", "pvera_dropout"}
        ),
    )
    endings: ClassVar = {"lambda_b": ".pvera_lambda_b", "lambda_d": ".pvera_lambda_d"}
    shared_names: ClassVar = {"shared_a": "base_model.pvera_A", "shared_b": "base_model.pvera_B"}

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
        shared = {"shared_a": (2 * self.r, widest), "shared_b": (highest, self.r)}
        return Targets({name: PveraTarget(module, self.r) for name, module in modules.items()}, shared)

"""TinyLoRA: the singular directions of a weight, mixed by a matrix that a few trained numbers make of random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape, check_projection
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class TinyLoraTarget(ModuleTarget):
    """One module, of the group of modules whose `count` trained numbers are `role`."""

    r: int
    count: int
    role: str

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.role

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"a": (self.r, wide), "b": (out, self.r), "random": (self.count, self.r, self.r)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target."""
        return work_of(self.numbers(found), reading=self.size[0] * self.r**2)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        mixed = torch.einsum("u,ujk->jk", tensors[self.role].float(), tensors["random"].float())
        return (LowRank(tensors["a"].float(), tensors["b"].float() @ mixed),)


@dataclass(frozen=True)
class TinyLoraTuner(ModuleTuner):
    """See the module."""

    peft_type = "TINYLORA"
    kind = "tinylora"
    marker = ".tinylora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"r", "save_projection", "u", "weight_tying"},
        ignorable=frozenset({"fan_in_fan_out", "init_v_bound", "init_weights", "projection_seed", "tinylora_dropout"}),
    )
    endings: ClassVar = {"a": ".tinylora_A", "b": ".tinylora_B", "random": ".tinylora_P"}

    r: int
    count: int
    tying: float

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        check_projection(config)
        tying = config.number("weight_tying", 0)
        if not 0 <= tying <= 1:
            raise bad_key("weight_tying", f"{tying:g} is not between 0 and 1", "save the adapter again with PEFT")
        return {"r": config.rank("r", 2), "count": config.rank("u", 64), "tying": tying}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """Groups are neighbors in the model's order, all of one size but the last, which takes the rest."""
        groups = max(1, round(len(modules) * (1.0 - self.tying)))
        size = max(1, len(modules) // groups)
        targets = {}
        for index, (name, module) in enumerate(modules.items()):
            r = min(self.r, module.in_features, module.out_features)
            targets[name] = TinyLoraTarget(module, r, self.count, f"group{min(index // size, groups - 1)}")
        return Targets(
            targets,
            {f"group{index}": (self.count,) for index in range(groups)},
            {f"group{index}": f"base_model.tinylora_v.{index}" for index in range(groups)},
        )

"""Super-Tuning: the weights that are largest or smallest are trained, beside a LoRA or alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.positions import add_at, whole_numbers
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import SORT, Work, work_of
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class SupertuningTarget(ModuleTarget):
    """One module, of which `count` weights are trained; r is 0 where there is no LoRA."""

    count: int
    r: int
    scale: float

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.scale.hex()

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        shapes: dict[str, Shape] = {"values": (self.count,), "indices": (self.count,)}
        return shapes | ({"a": (self.r, wide), "b": (out, self.r)} if self.r else {})

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: positions are sorted."""
        kept = 3 * self.count + self.numbers(found)
        return work_of(kept, reading=SORT * self.count, scratch=48 * self.count)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        places = whole_numbers(tensors["indices"], out * wide, self.module.name, "supertuning_indices")
        dense = Dense(add_at(places, tensors["values"]), out, wide)
        return (dense, LowRank(tensors["a"], tensors["b"].float() * self.scale)) if self.r else (dense,)


@dataclass(frozen=True)
class SupertuningTuner(ModuleTuner):
    """See the module."""

    peft_type = "SUPERTUNING"
    kind = "supertuning"
    marker = ".supertuning_"
    keys = ConfigKeys(
        applied=frozenset({"lora_alpha", "r", "save_precomputed_indices", "sparsity", "target_modules"}),
        # How the positions were chosen.
        ignorable=frozenset({"init_weights", "lora_dropout", "select_top"}),
    )
    smaller = "train fewer positions, or adapt fewer modules"
    endings: ClassVar = {
        "values": ".supertuning_values",
        "indices": ".supertuning_indices",
        "a": ".supertuning_lora_A.weight",
        "b": ".supertuning_lora_B.weight",
    }
    index_roles = frozenset({"indices"})

    r: int
    alpha: float
    sparsity: float

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        if not config.flag("save_precomputed_indices", True):
            raise bad_key(
                "save_precomputed_indices",
                "the positions are not in the file, and many weights of a base in 4 bits are equally large",
                "save with save_precomputed_indices=True",
            )
        sparsity = config.number("sparsity", 0.99)
        if not 0 <= sparsity < 1:
            raise bad_key("sparsity", f"{sparsity:g} is not from 0 to below 1", "save the adapter again with PEFT")
        r = 0 if config.raw.get("r") is None else config.rank("r")
        return {"r": r, "alpha": config.number("lora_alpha") if r else 0.0, "sparsity": sparsity}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        scale, targets = (self.alpha / self.r if self.r else 0.0), {}
        for name, module in modules.items():
            # In this order: another one rounds otherwise.
            count = int(module.in_features * module.out_features * (1 - self.sparsity))
            targets[name] = SupertuningTarget(module, count, self.r, scale)
        return Targets(targets)

"""Uni-LoRA: every entry of every factor is one of a few numbers that all modules share (Li et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.positions import whole_numbers
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import GATHER, Work, work_of
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class UniLoraTarget(ModuleTarget):
    """One module: which of `length` numbers each entry is, and what it is multiplied by."""

    r: int
    length: int

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        a, b = (self.r, wide), (out, self.r)
        return {"indices_a": a, "scales_a": a, "indices_b": b, "scales_b": b}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: each entry is looked up."""
        kept = self.r * sum(self.size)
        return work_of(kept, reading=GATHER * kept, scratch=16 * kept)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        return (LowRank(self._factor(tensors, "a"), self._factor(tensors, "b")),)

    def _factor(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        what = f"unilora_indices_{name.upper()}"
        indices = whole_numbers(tensors[f"indices_{name}"], self.length, self.module.name, what)
        return tensors["numbers"][indices].float() * tensors[f"scales_{name}"].float()


@dataclass(frozen=True)
class UniLoraTuner(ModuleTuner):
    """See the module."""

    peft_type = "UNILORA"
    kind = "unilora"
    marker = ".unilora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"r", "save_indices", "theta_d_length"},
        ignorable=frozenset({"fan_in_fan_out", "init_theta_d_bound", "init_weights", "proj_seed", "unilora_dropout"}),
    )
    endings: ClassVar = {
        f"{role}_{factor}": f".unilora_{role}_{factor.upper()}" for role in ("indices", "scales") for factor in "ab"
    }
    shared_names: ClassVar = {"numbers": "base_model.unilora_theta_d"}
    index_roles = frozenset({"indices_a", "indices_b"})

    r: int
    length: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        if not config.flag("save_indices"):
            raise bad_key(
                "save_indices",
                "which number each entry is, is not in the file, and another version of numpy may shuffle otherwise",
                "load the adapter where it was trained, and save it with save_indices=True",
            )
        return {"r": config.rank("r", 4), "length": config.amount("theta_d_length", 256)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        each = {name: UniLoraTarget(module, self.r, self.length) for name, module in modules.items()}
        return Targets(each, {"numbers": (self.length,)})

"""HiRA: each weight is changed in proportion to itself, by a low rank of factors (Huang et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class ScaleWeights(WeightChange):
    """W + W * (B A). Takes out * in * r products and one more W."""

    a: torch.Tensor  # [r, in], float32
    b: torch.Tensor  # [out, r]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return weight.addcmul_(weight, self.b @ self.a)


@dataclass(frozen=True)
class HiraTarget(ModuleTarget):
    """The rank is the file's: PEFT 0.21.2 heeds rank_pattern on quantized modules only."""

    def rank(self, found: Mapping[str, Shape]) -> int:
        """Of the factors; it takes no rank rows."""
        return (*found.get("a", ()), 0)[0]

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        rank, (out, wide) = self.rank(found), self.size
        return {"a": (rank, wide), "b": (out, rank)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target."""
        return work_of(self.numbers(found), making=self.size[0] * self.size[1] * self.rank(found))

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        return (Dense(ScaleWeights(tensors["a"].float(), tensors["b"].float()), *self.size),)


@dataclass(frozen=True)
class HiraTuner(ModuleTuner):
    """See the module."""

    peft_type = "HIRA"
    kind = "hira"
    marker = ".hira_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS,
        ignorable=frozenset({"fan_in_fan_out", "hira_dropout", "init_weights", "r", "rank_pattern"}),
    )
    endings: ClassVar = {"a": ".hira_A", "b": ".hira_B"}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: HiraTarget(module) for name, module in modules.items()})

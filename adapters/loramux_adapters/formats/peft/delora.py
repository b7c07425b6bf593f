"""DeLoRA: a low rank whose pairs of vectors have length one, and a strength that is trained apart
(Bini et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Patterned, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_SHORTEST = 1e-4  # a vector that is shorter counts as this long


@dataclass(frozen=True)
class DeloraTarget(ModuleTarget):
    """One module."""

    r: int

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"a": (self.r, wide), "b": (out, self.r), "strength": (1,), "column_lengths": (wide,)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """The file has the lengths of the base's columns, as they were where the adapter was trained."""
        a, b = tensors["a"].float(), tensors["b"].float()
        lengths = a.norm(dim=1).clamp(min=_SHORTEST) * b.norm(dim=0).clamp(min=_SHORTEST)
        scale = tensors["strength"].float() / self.r / lengths
        return (LowRank(a * tensors["column_lengths"].float(), b * scale),)


@dataclass(frozen=True)
class DeloraTuner(ModuleTuner):
    """See the module."""

    peft_type = "DELORA"
    kind = "delora"
    marker = ".delora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"r", "rank_pattern"},
        # The strength that training began with.
        ignorable=frozenset({"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"}),
    )
    endings: ClassVar = {
        "a": ".delora_A",
        "b": ".delora_B",
        "strength": ".delora_lambda",
        "column_lengths": ".delora_w_norm",
    }

    r: int
    rank_pattern: Mapping[str, int]

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"r": config.rank("r", 8), "rank_pattern": config.ranks("rank_pattern")}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        ranks = Patterned(self.r, self.rank_pattern, "rank_pattern", budget)
        return Targets({name: DeloraTarget(module, ranks.of(name)) for name, module in modules.items()})

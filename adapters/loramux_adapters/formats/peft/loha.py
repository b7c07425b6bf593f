"""LoHa: the elementwise product of two low ranks, which is one of rank r * r (Hyeon-Woo et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Patterned, Shape, fits_low_rank
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class AddHadamard(WeightChange):
    """W + (B1 A1) * (B2 A2), the scale in B1."""

    b1: torch.Tensor  # [out, r]
    a1: torch.Tensor  # [r, in]
    b2: torch.Tensor
    a2: torch.Tensor

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return weight.addcmul_(self.b1 @ self.a1, self.b2 @ self.a2)


@dataclass(frozen=True)
class LohaTarget(ModuleTarget):
    """One module."""

    r: int
    scale: float
    is_low_rank: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.scale.hex()

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r * self.r if self.is_low_rank else 0

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"b1": (out, self.r), "a1": (self.r, wide), "b2": (out, self.r), "a2": (self.r, wide)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: two products where the weight is made, or the pairs of all ranks."""
        making = 0 if self.is_low_rank else 2 * self.size[0] * self.size[1] * self.r
        return work_of(self.numbers(found), making=making)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """Each pair of ranks is one rank of the product."""
        b1, a1, b2, a2 = (tensors[role].float() for role in ("b1", "a1", "b2", "a2"))
        b1 = b1 * self.scale
        out, wide = self.size
        if not self.is_low_rank:
            return (Dense(AddHadamard(b1, a1, b2, a2), out, wide),)
        a = (a1[:, None] * a2[None]).reshape(-1, wide)
        return (LowRank(a, (b1[:, :, None] * b2[:, None]).reshape(out, -1)),)


@dataclass(frozen=True)
class LohaTuner(ModuleTuner):
    """See the module."""

    peft_type = "LOHA"
    kind = "loha"
    marker = ".hada_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"alpha", "alpha_pattern", "r", "rank_pattern"},
        ignorable=frozenset({"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"}),
    )
    endings: ClassVar = {"b1": ".hada_w1_a", "a1": ".hada_w1_b", "b2": ".hada_w2_a", "a2": ".hada_w2_b"}

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {
            "r": config.rank("r", 8),
            "alpha": config.number("alpha", 8),
            "rank_pattern": config.ranks("rank_pattern"),
            "alpha_pattern": config.numbers("alpha_pattern"),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        ranks = Patterned(self.r, self.rank_pattern, "rank_pattern", budget)
        alphas = Patterned(self.alpha, self.alpha_pattern, "alpha_pattern", budget)
        targets = {}
        for name, module in modules.items():
            r = ranks.of(name)
            targets[name] = LohaTarget(module, r, alphas.of(name) / r, fits_low_rank(r * r, module, limits))
        return Targets(targets)

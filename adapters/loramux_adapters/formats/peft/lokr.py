"""LoKr: the Kronecker product of two small matrices, each whole or of low rank (Yeh et al., 2024).

(U1 V1) x (U2 V2) = (U1 x U2)(V1 x V2): a low rank whose rank is the product of theirs. A whole matrix is its own factor
beside the identity.
"""

from __future__ import annotations

import math
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
class AddKronecker(WeightChange):
    """W + W1 x W2."""

    w1: torch.Tensor
    w2: torch.Tensor

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return weight.add_(torch.kron(self.w1, self.w2))


@dataclass(frozen=True)
class LokrTarget(ModuleTarget):
    """One module: `first` and `second` are the sizes of the two matrices."""

    r: int
    scale: float
    first: tuple[int, int]
    second: tuple[int, int]
    is_first_whole: bool
    is_second_whole: bool
    is_low_rank: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.scale.hex()

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.true_rank if self.is_low_rank else 0

    @property
    def true_rank(self) -> int:
        """Of the product's factors."""
        first = min(self.first) if self.is_first_whole else self.r
        return first * (min(self.second) if self.is_second_whole else self.r)

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        shapes: dict[str, Shape] = {}
        for name, (out, wide), whole in (
            ("w1", self.first, self.is_first_whole),
            ("w2", self.second, self.is_second_whole),
        ):
            shapes |= {name: (out, wide)} if whole else {f"{name}_a": (out, self.r), f"{name}_b": (self.r, wide)}
        return shapes

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: a matrix that is a product is multiplied out where the change is no low rank."""
        kept = self.numbers(found)
        if self.is_low_rank:
            return work_of(kept)
        first, second = (math.prod(self.first), math.prod(self.second))
        return work_of(kept + first + second, reading=self.r * (first + second))

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See the module."""
        if not self.is_low_rank:
            return (Dense(AddKronecker(_matrix(tensors, "w1") * self.scale, _matrix(tensors, "w2")), *self.size),)
        u1, v1 = _factors(tensors, "w1")
        u2, v2 = _factors(tensors, "w2")
        return (LowRank(torch.kron(v1, v2), torch.kron(u1 * self.scale, u2)),)


def _matrix(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name].float()
    return tensors[f"{name}_a"].float() @ tensors[f"{name}_b"].float()


def _factors(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(U, V) with U V = the matrix."""
    if name not in tensors:
        return tensors[f"{name}_a"].float(), tensors[f"{name}_b"].float()
    whole = tensors[name].float()
    out, wide = whole.shape
    identity = torch.eye(min(out, wide), device=whole.device)
    return (identity, whole) if out <= wide else (whole, identity)


@dataclass(frozen=True)
class LokrTuner(ModuleTuner):
    """See the module."""

    peft_type = "LOKR"
    kind = "lokr"
    marker = ".lokr_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"alpha", "alpha_pattern", "decompose_both", "decompose_factor", "r", "rank_pattern"},
        ignorable=frozenset(
            {"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"}
        ),
    )
    endings: ClassVar = {name: f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    decompose_both: bool
    decompose_factor: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        factor = config.raw.get("decompose_factor", -1)
        return {
            "r": config.rank("r", 8),
            "alpha": config.number("alpha", 8),
            "rank_pattern": config.ranks("rank_pattern"),
            "alpha_pattern": config.numbers("alpha_pattern"),
            "decompose_both": config.flag("decompose_both"),
            "decompose_factor": -1 if factor == -1 else config.rank("decompose_factor"),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        ranks = Patterned(self.r, self.rank_pattern, "rank_pattern", budget)
        alphas = Patterned(self.alpha, self.alpha_pattern, "alpha_pattern", budget)
        return Targets({name: self._target(module, ranks, alphas, limits) for name, module in modules.items()})

    def _target(
        self, module: ModuleSpec, ranks: Patterned[int], alphas: Patterned[float], limits: ReadLimits
    ) -> LokrTarget:
        r = ranks.of(module.name)
        out_first, out_second = factorization(module.out_features, self.decompose_factor)
        in_first, in_second = factorization(module.in_features, self.decompose_factor)
        first, second = (out_first, in_first), (out_second, in_second)
        is_first_whole = not (self.decompose_both and r < max(first) / 2)
        is_second_whole = not r < max(second) / 2
        scale = alphas.of(module.name) / r
        target = LokrTarget(module, r, scale, first, second, is_first_whole, is_second_whole, is_low_rank=True)
        fits = fits_low_rank(target.true_rank, module, limits)
        return LokrTarget(module, r, scale, first, second, is_first_whole, is_second_whole, is_low_rank=fits)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """The two factors of `dimension` that PEFT 0.21.2 takes: shapes depend on it.

    (`factor`, the rest) where that divides; else the largest divisor up to `factor` (-1: any) and the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = max(divisor for divisor in range(1, most + 1) if dimension % divisor == 0)
    return first, dimension // first

"""GraLoRA: a low rank for each of k x k blocks of the weight, which is one of rank k * r (Jung et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class GraloraTarget(ModuleTarget):
    """One module: k blocks a side, r ranks that the k blocks of outputs share, and a plain low rank of `hybrid_r`."""

    r: int
    k: int
    hybrid_r: int
    scale: float

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.scale.hex()

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.k * self.r + self.hybrid_r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        shapes: dict[str, Shape] = {"a": (self.k, wide // self.k, self.r), "b": (self.k, self.r, out // self.k)}
        return shapes | ({"hybrid_a": (self.hybrid_r, wide), "hybrid_b": (out, self.hybrid_r)} if self.hybrid_r else {})

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """The ranks of block (i, j) read input block i and write output block j."""
        (out, wide), k, each = self.size, self.k, self.r // self.k
        a = torch.zeros(k, k, each, k, wide // k)  # [input block, output block, rank, input block, input]
        b = torch.zeros(k, out // k, k, k, each)  # [output block, output, input block, output block, rank]
        by_block = tensors["a"].float().view(k, wide // k, k, each)
        by_output = tensors["b"].float().view(k, k, each, out // k)
        for i in range(k):
            a[i, :, :, i] = by_block[i].permute(1, 2, 0)
            b[i, :, :, i] = by_output[i].permute(2, 0, 1)
        factors = [a.reshape(k * self.r, wide)], [b.reshape(out, k * self.r)]
        if self.hybrid_r:
            factors[0].append(tensors["hybrid_a"].float())
            factors[1].append(tensors["hybrid_b"].float())
        return (LowRank(torch.cat(factors[0]), torch.cat(factors[1], dim=1) * self.scale),)


@dataclass(frozen=True)
class GraloraTuner(ModuleTuner):
    """See the module."""

    peft_type = "GRALORA"
    kind = "gralora"
    marker = ".gralora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"alpha", "gralora_k", "hybrid_r", "r"},
        ignorable=frozenset({"fan_in_fan_out", "gralora_dropout", "init_weights"}),
    )
    endings: ClassVar = {
        "a": ".gralora_A",
        "b": ".gralora_B",
        "hybrid_a": ".gralora_A_general.weight",
        "hybrid_b": ".gralora_B_general.weight",
    }

    r: int
    k: int
    hybrid_r: int
    alpha: float

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        r, k = config.rank("r", 32), config.rank("gralora_k", 2)
        if r % k:
            raise bad_key("gralora_k", f"{k} does not divide r, {r}", "save config and weights together")
        return {"r": r, "k": k, "hybrid_r": config.count("hybrid_r", 0), "alpha": config.number("alpha", 64)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        for name, module in modules.items():
            if module.in_features % self.k or module.out_features % self.k:
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: gralora_k {self.k} does not divide the sizes of {quote(name)}",
                    subject=f"{CONFIG_FILE}: gralora_k",
                    remedy="upload an adapter made for this base",
                )
        scale = self.alpha / (self.r + self.hybrid_r)
        each = {name: GraloraTarget(module, self.r, self.k, self.hybrid_r, scale) for name, module in modules.items()}
        return Targets(each)

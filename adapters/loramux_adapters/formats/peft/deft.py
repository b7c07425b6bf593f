"""DEFT and PaRa: directions of a module's outputs are taken out, and others put in (Chen et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class ReplaceDirections(WeightChange):
    """W - Q (P' W - R). A low rank whose A depends on the base. Takes 2 * out * in * r products."""

    q: torch.Tensor  # [out, r], float32
    p: torch.Tensor  # [out, r]
    r: torch.Tensor  # [r, in], scaled

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return weight.addmm_(self.q, self.p.T @ weight - self.r, alpha=-1)


@dataclass(frozen=True)
class DeftTarget(ModuleTarget):
    """One module; `scale` is None where nothing is put in (PaRa)."""

    r: int
    scale: float | None
    is_orthogonal: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return [self.is_orthogonal, None if self.scale is None else self.scale.hex()]

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target; it takes no rank rows."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"p": (out, self.r)} | ({} if self.scale is None else {"r": (self.r, wide)})

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: directions are made orthogonal one after the other."""
        out, wide = self.size
        reading = 8 * out * self.r**2 if self.is_orthogonal else 0
        return work_of(self.numbers(found), reading=reading, making=2 * out * wide * self.r)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        p = tensors["p"].float()
        q, p = (torch.linalg.qr(p).Q,) * 2 if self.is_orthogonal else (p, p.relu())
        r = torch.zeros(self.r, self.size[1]) if self.scale is None else tensors["r"].float() * self.scale
        return (Dense(ReplaceDirections(q, p, r), *self.size),)


@dataclass(frozen=True)
class DeftTuner(ModuleTuner):
    """See the module."""

    peft_type = "DEFT"
    kind = "deft"
    marker = ".deft_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"alpha", "decomposition_method", "para", "r"},
        ignorable=frozenset({"deft_dropout", "fan_in_fan_out", "init_scale", "init_weights"}),
    )
    endings: ClassVar = {"p": ".deft_P", "r": ".deft_R"}

    r: int
    alpha: float
    para: bool
    is_orthogonal: bool

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner. An alpha of null or 0 stands for no scale."""
        return {
            "r": config.rank("r", 8),
            "alpha": 0.0 if config.raw.get("alpha") is None else config.number("alpha"),
            "para": config.flag("para"),
            "is_orthogonal": config.choice("decomposition_method", ("relu", "qr"), "relu") == "qr",
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        targets = {}
        for name, module in modules.items():
            r = min(self.r, module.out_features)
            scale = self.alpha / r if self.alpha else 1.0
            targets[name] = DeftTarget(module, r, None if self.para else scale, self.is_orthogonal)
        return Targets(targets)

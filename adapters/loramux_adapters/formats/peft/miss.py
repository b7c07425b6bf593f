"""MiSS: one block that all groups of inputs share: each group's inputs are summed before it (Kang and Yin, 2024).

The plain form and `mini` are a low rank whose A only sums; `bat` mixes the block with the base's own weight.
"""

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
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class MixBlocks(WeightChange):
    """Every r x r block of W becomes W + W S + S, with one S for each r outputs."""

    blocks: torch.Tensor  # [out / r, r, r]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        (out, wide), r = weight.shape, self.blocks.shape[-1]
        by_block = weight.view(out // r, r, wide // r, r).permute(2, 0, 1, 3)
        changed = by_block + by_block @ self.blocks + self.blocks
        return changed.permute(1, 2, 0, 3).reshape(out, wide)


@dataclass(frozen=True)
class MissTarget(ModuleTarget):
    """One module. `form` is plain, mini or bat."""

    r: int
    mini_r: int
    form: str

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.form

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return 0 if self.form == "bat" else self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out = self.size[0]
        if self.form == "bat":
            return {"block": (out // self.r, self.r, self.r)}
        return {"block": (self.r, self.mini_r if self.form == "mini" else out)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target."""
        making = self.size[0] * self.size[1] * self.r if self.form == "bat" else 0
        return work_of(self.numbers(found), making=making)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        block, (out, wide) = tensors["block"].float(), self.size
        if self.form == "bat":
            return (Dense(MixBlocks(block), out, wide),)
        a = torch.eye(self.r).repeat(1, -(-wide // self.r))[:, :wide]
        return (LowRank(a, block.T.repeat(out // block.shape[1], 1)),)


@dataclass(frozen=True)
class MissTuner(ModuleTuner):
    """See the module."""

    peft_type = "MISS"
    kind = "miss"
    marker = ".miss_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"init_weights", "mini_r", "r"},
        ignorable=frozenset({"miss_dropout"}),
    )
    endings: ClassVar = {"block": ".miss_block"}

    r: int
    mini_r: int
    form: str

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner. `init_weights` names the form as well."""
        value = config.raw.get("init_weights", True)
        if not isinstance(value, bool) and value not in ("bat", "mini"):
            raise bad_key("init_weights", f"{quote(value)} is no form of MiSS", "save the adapter again with PEFT")
        form = value if isinstance(value, str) else "plain"
        return {"r": config.rank("r", 64), "mini_r": config.rank("mini_r", 1), "form": form}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        for name, module in modules.items():
            is_whole = {
                "plain": self.r <= module.in_features,
                "mini": self.r <= module.in_features and module.out_features % self.mini_r == 0,
                "bat": module.in_features % self.r == 0 and module.out_features % self.r == 0,
            }
            if not is_whole[self.form]:
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: r {self.r} and mini_r {self.mini_r} do not divide the sizes of {quote(name)}",
                    subject=f"{CONFIG_FILE}: r",
                    remedy="upload an adapter made for this base",
                )
        return Targets({name: MissTarget(module, self.r, self.mini_r, self.form) for name, module in modules.items()})

"""BOFT: inputs are rotated by several block-diagonal factors, each in an order of its own, and outputs are scaled
(Liu et al., 2024: orthogonal butterflies).
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
from loramux_adapters.formats.peft.rotations import cayley, cayley_work, check_block, rotate_columns
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class RotateByFactors(WeightChange):
    """s * (W F0' F1' ...) with each factor F = P R P': P reorders, R is block-diagonal.

    Takes out * in * b products a factor for blocks b wide, and three copies of W.
    """

    blocks: torch.Tensor  # [factors, in / b, b, b], float32
    scale: torch.Tensor  # [out, 1]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        for number, factor in enumerate(self.blocks):
            order = butterfly_order(weight.shape[1], factor.shape[-1], number).to(weight.device)
            weight = rotate_columns(weight[:, order.argsort()], factor)[:, order]
        return weight * self.scale


def butterfly_order(size: int, block: int, factor: int) -> torch.Tensor:
    """Where each of `size` inputs is read from by the factor of that number: in runs of 2^factor blocks the half
    blocks of even number come first.
    """
    if factor == 0:
        return torch.arange(size)
    return torch.arange(size).view(-1, 2**factor, 2, block // 2).transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class BoftTarget(ModuleTarget):
    """One module."""

    factors: int
    block: int

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"blocks": (self.factors, wide // self.block, self.block, self.block), "scale": (out, 1)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target."""
        out, wide = self.size
        count = self.factors * (wide // self.block)
        blocks = count * self.block**2
        making = out * wide * self.block * self.factors
        return work_of(blocks + out, reading=cayley_work(count, self.block), making=making, scratch=12 * blocks)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        raw = tensors["blocks"].float()
        blocks = cayley(((raw - raw.transpose(-1, -2)) / 2).flatten(0, 1)).view(raw.shape)
        return (Dense(RotateByFactors(blocks, tensors["scale"].float()), *self.size),)


@dataclass(frozen=True)
class BoftTuner(ModuleTuner):
    """See the module."""

    peft_type = "BOFT"
    kind = "boft"
    marker = ".boft_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"boft_block_num", "boft_block_size", "boft_n_butterfly_factor"},
        ignorable=frozenset({"boft_dropout", "fan_in_fan_out", "init_weights"}),
    )
    smaller = "train with smaller blocks, or adapt fewer modules"
    endings: ClassVar = {"blocks": ".boft_R", "scale": ".boft_s"}
    biases = ("none", "all", "boft_only")

    block_size: int
    block_num: int
    factors: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        block_size, block_num = config.count("boft_block_size", 4), config.count("boft_block_num", 0)
        if (block_size == 0) == (block_num == 0):
            raise bad_key(
                "boft_block_size", "exactly one of it and boft_block_num must be 0", "save the adapter again with PEFT"
            )
        return {
            "block_size": block_size,
            "block_num": block_num,
            "factors": config.rank("boft_n_butterfly_factor", 1),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: self._target(module) for name, module in modules.items()})

    def _target(self, module: ModuleSpec) -> BoftTarget:
        key, wide = ("boft_block_size" if self.block_size else "boft_block_num"), module.in_features
        if wide % (self.block_size or self.block_num):
            raise _does_not_divide(key, module)
        block = self.block_size or wide // self.block_num
        check_block(block, key, module.name)
        # As many factors as there are ways to pair the blocks.
        if self.factors > 1 and (block % 2 or self.factors > 32 or wide % (block * 2 ** (self.factors - 1))):
            raise _does_not_divide("boft_n_butterfly_factor", module)
        return BoftTarget(module, self.factors, block)


def _does_not_divide(key: str, module: ModuleSpec) -> AdapterIncompatible:
    return AdapterIncompatible(
        f"{CONFIG_FILE}: {key} does not divide the {module.in_features} inputs of {quote(module.name)} into blocks",
        subject=f"{CONFIG_FILE}: {key}",
        remedy="upload an adapter made for this base",
    )

"""OFT: blocks of a module's inputs are rotated (Qiu et al., 2023; Liu et al., 2024)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.rotations import RotateInputs, cayley, cayley_work, check_block, series_work
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})")
_MAX_TERMS = 64  # of the series: each is a product of all blocks


@dataclass(frozen=True)
class OftTarget(ModuleTarget):
    """One module: rotations of `block` inputs each; `terms` of Neumann's series, 0 for the exact Cayley transform.

    `most` is the largest length of a rotation's skew matrix (constrained OFT).
    """

    block: int
    is_shared: bool
    terms: int
    most: float | None

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return [self.block, self.terms, None if self.most is None else self.most.hex()]

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        count = 1 if self.is_shared else self.size[1] // self.block
        return {"skew": (count, self.block * (self.block - 1) // 2)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: the blocks are made in four copies."""
        count = 1 if self.is_shared else self.size[1] // self.block
        blocks = count * self.block**2
        reading = series_work(count, self.block, max(self.terms, 4)) if self.terms else cayley_work(count, self.block)
        return work_of(blocks, reading=reading, making=self.size[0] * self.size[1] * self.block, scratch=16 * blocks)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """The file has the upper triangles of the skew matrices."""
        upper = tensors["skew"].float()
        rows, columns = torch.triu_indices(self.block, self.block, 1)
        skew = torch.zeros(len(upper), self.block, self.block)
        skew[:, rows, columns] = upper
        skew[:, columns, rows] = -upper
        if self.most is not None:
            length = skew.norm(dim=(1, 2), keepdim=True)
            skew = skew * (self.most / length).nan_to_num(1, posinf=1).clamp(max=1)
        blocks = _series(skew, self.terms) if self.terms else cayley(skew)
        return (Dense(RotateInputs(blocks), *self.size),)


def _series(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2 S + 2 S^2 + ... + S^n as PEFT 0.18 and later cut it: n = terms - 1, of three terms as of four."""
    total = torch.eye(skew.shape[-1]).repeat(len(skew), 1, 1)
    if terms == 2:
        return total + 2 * skew
    power, last = skew, (max(terms, 4) - 1 if terms > 2 else 0)
    for number in range(1, last + 1):
        total += power * (1 if number == last else 2)
        power = power @ skew
    return total


@dataclass(frozen=True)
class OftTuner(ModuleTuner):
    """See the module."""

    peft_type = "OFT"
    kind = "oft"
    marker = ".oft_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS
        | {"block_share", "coft", "eps", "num_cayley_neumann_terms", "oft_block_size", "r", "use_cayley_neumann"},
        ignorable=frozenset({"fan_in_fan_out", "init_weights", "module_dropout"}),
    )
    smaller = "train with smaller blocks, or adapt fewer modules"
    endings: ClassVar = {"skew": ".oft_R.weight"}

    r: int
    block_size: int
    is_shared: bool
    terms: int
    eps: float | None

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner. Before PEFT 0.18 the same numbers meant other rotations."""
        if "oft_block_size" not in config.raw:
            raise bad_key(
                "oft_block_size", "is missing: before PEFT 0.14 OFT was another method", "train with a newer PEFT"
            )
        r, block_size = config.count("r", 0), config.count("oft_block_size")
        if (r == 0) == (block_size == 0):
            raise bad_key("oft_block_size", "exactly one of it and r must be 0", "save the adapter again with PEFT")
        terms = 0
        if config.flag("use_cayley_neumann", True):
            _check_version(config.raw.get("peft_version"))
            terms = config.rank("num_cayley_neumann_terms", 5)
            if terms > _MAX_TERMS:
                raise bad_key("num_cayley_neumann_terms", f"{terms} is over {_MAX_TERMS}", "train with fewer terms")
        return {
            "r": r,
            "block_size": block_size,
            "is_shared": config.flag("block_share"),
            "terms": terms,
            "eps": config.number("eps", 6e-5) if config.flag("coft") else None,
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: self._target(module) for name, module in modules.items()})

    def _target(self, module: ModuleSpec) -> OftTarget:
        wide = module.in_features
        block = nearest_divisor(wide, self.block_size) if self.block_size else wide // nearest_divisor(wide, self.r)
        check_block(block, "oft_block_size" if self.block_size else "r", module.name)
        count = 1 if self.is_shared else wide // block
        most = None if self.eps is None else self.eps / math.sqrt(count)
        return OftTarget(module, block, self.is_shared, self.terms, most)


def _check_version(version: object) -> None:
    found = _VERSION.match(version) if isinstance(version, str) else None
    if found is None or (int(found[1]), int(found[2])) < (0, 18):
        raise bad_key(
            "peft_version",
            "the Cayley-Neumann series was another one before PEFT 0.18, whose files do not name their version or "
            "an older one",
            "train with PEFT 0.18 or later, or with use_cayley_neumann=False",
        )


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that PEFT 0.21.2 takes for `wanted`: the nearest, of two equally near the smaller."""
    if wanted >= size:
        return size
    distance = 0
    while True:
        for candidate in (wanted - distance, wanted + distance):
            if candidate > 0 and size % candidate == 0:
                return candidate
        distance += 1

"""HRA: the input is reflected at r hyperplanes, W (I - 2 u1 u1') ... (I - 2 ur ur') (Yuan et al., 2024).

The product of reflections is I - U T U' with an upper triangular T (Schreiber and Van Loan, 1989): a low rank on the
input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class HraTarget(ModuleTarget):
    """One module; `is_orthogonal` where the hyperplanes are made orthogonal first (Gram-Schmidt)."""

    r: int
    is_orthogonal: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.is_orthogonal

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target."""
        return self.r

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"u": (self.size[1], self.r)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: the hyperplanes' products with each other, in float64; Gram-Schmidt takes them one by one."""
        products = self.r**2 * self.size[1]
        kept = self.numbers(found)
        making = self.size[0] * self.size[1] * self.r
        return work_of(kept, reading=(60 if self.is_orthogonal else 6) * products, making=making, scratch=16 * kept)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """In float64: the columns may be nearly alike."""
        u = _orthogonal(tensors["u"].double()) if self.is_orthogonal else tensors["u"].double()
        u = u / u.norm(dim=0)
        if not bool(torch.isfinite(u).all()):
            raise AdapterInvalid(
                f"{WEIGHTS_FILE}: hra_u of module {quote(self.module.name)} has a column that is no direction",
                subject=f"{WEIGHTS_FILE}: {quote(self.module.name)}",
                remedy="train with a smaller r",
            )
        t, products = torch.zeros(self.r, self.r, dtype=u.dtype), u.T @ u
        for index in range(self.r):
            t[:index, index] = -2 * t[:index, :index] @ products[:index, index]
            t[index, index] = 2
        return (LowRank(u.T.float().contiguous(), (-u @ t).float(), on_input=True),)


def _orthogonal(u: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt; twice per column, as one pass over all columns before it rounds more than one after the other."""
    columns = torch.zeros_like(u)
    for index in range(u.shape[1]):
        before, column = columns[:, :index], u[:, index]
        for _ in range(2):
            column = column - before @ (before.T @ column)
        columns[:, index] = column / column.norm()
    return columns


@dataclass(frozen=True)
class HraTuner(ModuleTuner):
    """See the module."""

    peft_type = "HRA"
    kind = "hra"
    marker = ".hra_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"apply_GS", "r"},
        ignorable=frozenset({"init_weights"}),
    )
    endings: ClassVar = {"u": ".hra_u"}

    r: int
    apply_gs: bool

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"r": config.rank("r", 8), "apply_gs": config.flag("apply_GS")}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        return Targets({name: HraTarget(module, self.r, self.apply_gs) for name, module in modules.items()})

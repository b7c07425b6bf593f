"""GLoRA: W + W * A + B and b + b * D + E + W C, each of the five a low rank, a vector, a number or nothing
(Chavan et al., 2023).
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
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class ChangeAll(WeightChange):
    """See the module; A and B are products. Takes 2 * out * in * r products and one more W."""

    a_left: torch.Tensor  # [out, r], float32
    a_right: torch.Tensor  # [r, in]
    b_left: torch.Tensor
    b_right: torch.Tensor
    c: torch.Tensor  # [in]
    d: torch.Tensor  # [out]
    e: torch.Tensor  # [out]

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return weight.addcmul_(weight, self.a_left @ self.a_right).addmm_(self.b_left, self.b_right)

    def bias(self, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """See WeightChange."""
        return None if bias is None else bias + bias * self.d + self.e + weight @ self.c


@dataclass(frozen=True)
class GloraTarget(ModuleTarget):
    """One module. `forms`: path -> lora, vector, constant or none."""

    r: int
    forms: Mapping[str, str]

    def rank(self, found: Mapping[str, Shape]) -> int:
        """See Target; it takes no rank rows."""
        return self.r if "lora" in self.forms.values() else 0

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        shapes: dict[str, Shape] = {}
        for path, form in self.forms.items():
            whole = self._whole(path)
            rows, columns = (*whole, 1)[:2]
            if form == "lora":
                shapes |= {f"{path}_left": (rows, self.r), f"{path}_right": (self.r, columns)}
            elif form == "none":
                # PEFT writes the nothing, too.
                shapes[f"{path}_zeros"] = whole
            else:
                shapes[f"{path}_own"] = (1,) if form == "constant" else ((rows,) if path in "DE" else (rows, 1))
        return shapes

    def _whole(self, path: str) -> Shape:
        out, wide = self.size
        return {"A": (out, wide), "B": (out, wide), "C": (wide, 1), "D": (out,), "E": (out,)}[path]

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: what is no low rank becomes one of rank 1."""
        out, wide = self.size
        kept = self.numbers(found) + 5 * (out + wide)
        return work_of(kept, reading=self.rank(found) * wide, making=2 * out * wide * max(1, self.rank(found)))

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        pairs = {path: self._pair(tensors, path) for path in self.forms}
        vectors = {path: (pairs[path][0] @ pairs[path][1])[:, 0] for path in "CDE"}
        return (Dense(ChangeAll(*pairs["A"], *pairs["B"], *vectors.values()), *self.size),)

    def _pair(self, tensors: Mapping[str, torch.Tensor], path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors of what the path adds: a vector and a number are the same in each column."""
        rows, columns = (*self._whole(path), 1)[:2]
        if self.forms[path] == "lora":
            return tensors[f"{path}_left"].float(), tensors[f"{path}_right"].float()
        if self.forms[path] != "none":
            return tensors[f"{path}_own"].float().reshape(-1, 1).expand(rows, 1), torch.ones(1, columns)
        if bool(tensors[f"{path}_zeros"].any()):
            raise AdapterInvalid(
                f"{WEIGHTS_FILE}: glora_{path}.zeros of module {quote(self.module.name)} is not zero",
                subject=f"{WEIGHTS_FILE}: {quote(self.module.name)}",
                remedy="save the adapter again with PEFT",
            )
        return torch.zeros(rows, 1), torch.ones(1, columns)


@dataclass(frozen=True)
class GloraTuner(ModuleTuner):
    """See the module."""

    peft_type = "GLORA"
    kind = "glora"
    marker = ".glora_"
    keys = ConfigKeys(
        applied=frozenset({"config_A_B", "config_C", "config_D_E", "r", "target_modules"}),
        ignorable=frozenset({"init_weights"}),
    )
    endings: ClassVar = {
        f"{path}_{role}": f".glora_{path}.{name}"
        for path in "ABCDE"
        for role, name in (("left", "Xd"), ("right", "Xu"), ("own", "X"), ("zeros", "zeros"))
    }

    r: int
    of_weight: str
    of_input: str
    of_bias: str

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {
            "r": config.rank("r", 8),
            "of_weight": config.choice("config_A_B", ("lora", "vector", "constant", "none"), "lora"),
            "of_input": config.choice("config_C", ("lora", "vector", "none"), "lora"),
            "of_bias": config.choice("config_D_E", ("vector", "constant", "none"), "constant"),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """Where the base has no bias, nothing is trained of it."""
        targets = {}
        for name, module in modules.items():
            forms = {"A": self.of_weight, "B": self.of_weight, "C": "none", "D": "none", "E": "none"}
            if module.has_bias:
                forms |= {"C": self.of_input, "D": self.of_bias, "E": self.of_bias}
            targets[name] = GloraTarget(module, self.r, forms)
        return Targets(targets)

"""IA3: learned vectors scale the outputs of some modules and the inputs of others (Liu et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget, SafePattern
from loramux_adapters.formats.peft.config import ConfigKeys, Names, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.parts.input_gain import InputGain
from loramux_adapters.parts.output_gain import OutputGain
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True)
class Ia3Target(ModuleTarget):
    """One module; `is_feedforward` where its input is scaled."""

    is_feedforward: bool

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return "in" if self.is_feedforward else "out"

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        out, wide = self.size
        return {"gain": (1, wide) if self.is_feedforward else (out, 1)}

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        gain = tensors["gain"].float().reshape(-1)
        return (InputGain(gain) if self.is_feedforward else OutputGain(gain, with_bias=True),)


@dataclass(frozen=True)
class Ia3Tuner(ModuleTuner):
    """See the module."""

    peft_type = "IA3"
    kind = "ia3"
    marker = ".ia3_"
    keys = ConfigKeys(
        applied=frozenset({"exclude_modules", "feedforward_modules", "target_modules"}),
        ignorable=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    )
    endings: ClassVar = {"gain": ".ia3_l"}

    feedforward: Names

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {"feedforward": config.names("feedforward_modules")}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        is_feedforward = self._feedforward_predicate(budget)
        return Targets({name: Ia3Target(module, is_feedforward(name)) for name, module in modules.items()})

    def _feedforward_predicate(self, budget: RegexBudget) -> Callable[[str], bool]:
        """PEFT's rule, which is another one than for target_modules: a name ends with the text, whatever is before."""
        if isinstance(self.feedforward, str):
            return SafePattern(self.feedforward, f"{CONFIG_FILE}: feedforward_modules", budget).fullmatch
        endings = tuple(self.feedforward)
        return lambda name: name.endswith(endings)

"""FourierFT: some frequencies of the change of a weight are trained, at places drawn from a seed (Gao et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Patterned, Shape
from loramux_adapters.formats.peft.name_keys import DottedKeys
from loramux_adapters.formats.peft.positions import Drawn, check_fits
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import DRAW, Work, work_of
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class AddSpectrum(WeightChange):
    """W and the real part of the inverse Fourier transform of values at some places. Takes five W beside it."""

    places: torch.Tensor  # [n], row-major, each once
    values: torch.Tensor  # [n], float32, scaled

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        spectrum = torch.zeros_like(weight)
        spectrum.view(-1)[self.places] = self.values
        return weight.add_(torch.fft.ifft2(spectrum).real)


@dataclass(frozen=True)
class FourierftTarget(ModuleTarget):
    """One module."""

    count: int
    scale: float
    drawn: Drawn = field(compare=False)

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return [self.scale.hex(), self.drawn.seed]

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"spectrum": (self.count,)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: positions are drawn."""
        return work_of(3 * self.count, reading=DRAW * self.count)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        places = self.drawn.of(out * wide, self.count)
        return (Dense(AddSpectrum(places, tensors["spectrum"].float() * self.scale), out, wide),)


@dataclass(frozen=True)
class FourierftTuner(ModuleTuner):
    """See the module."""

    peft_type = "FOURIERFT"
    kind = "fourierft"
    marker = ".fourierft_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS | {"n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"},
        ignorable=frozenset({"fan_in_fan_out", "init_weights"}),
    )
    smaller = "train fewer positions, or adapt fewer modules"
    endings: ClassVar = {"spectrum": ".fourierft_spectrum"}

    count: int
    counts: Mapping[str, int]
    scale: float
    seed: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        return {
            "count": config.amount("n_frequency", 1000),
            "counts": config.amounts("n_frequency_pattern"),
            "scale": config.number("scaling", 150),
            "seed": config.seed("random_loc_seed", 777),
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        counts = Patterned(self.count, self.counts, "n_frequency_pattern", budget, DottedKeys)
        drawn, targets = Drawn(self.seed, "n_frequency"), {}
        for name, module in modules.items():
            count = counts.of(name)
            check_fits("n_frequency", count, module.out_features * module.in_features, name)
            drawn.expect(module.out_features * module.in_features, count)
            targets[name] = FourierftTarget(module, count, self.scale, drawn)
        return Targets(targets)

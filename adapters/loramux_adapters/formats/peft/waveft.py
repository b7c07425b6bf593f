"""WaveFT: some wavelet coefficients of the change of a weight are trained, at places drawn from a seed
(Bilican et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import SELECTION_KEYS, ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Patterned, Shape
from loramux_adapters.formats.peft.positions import Drawn, add_at, check_fits
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.wavelets import daubechies, synthesize
from loramux_adapters.formats.peft.work import DRAW, Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_MAX_MOMENTS = 10
_FAMILIES = {"haar": 1} | {f"db{moments}": moments for moments in range(1, _MAX_MOMENTS + 1)}
"""Name -> vanishing moments: a filter has twice as many taps."""


@dataclass(frozen=True, eq=False)
class AddWavelets(WeightChange):
    """W and one step of the inverse wavelet transform of values at some places.

    The coefficients of a filter with 2 m taps are a matrix that is wider and higher than W by 2 m - 2, both made even.
    Takes 2 m passes over it, and four W.
    """

    places: torch.Tensor  # [n], row-major of W; W lies in the middle of the coefficients
    values: torch.Tensor  # [n], float32, scaled
    low: torch.Tensor  # [2 m], float32

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        out, wide = weight.shape
        high, broad = (_even(size + len(self.low) - 2) for size in (out, wide))
        coefficients = torch.zeros(high, broad, device=weight.device)
        rows, columns = self.places // wide + (high - out) // 2, self.places % wide + (broad - wide) // 2
        coefficients[rows, columns] = self.values
        # PEFT 0.21.2 takes the upper right quarter for high-pass along rows, and the lower left for columns.
        coefficients = coefficients.view(2, high // 2, 2, broad // 2).transpose(0, 2).reshape(high, broad)
        return weight.add_(synthesize(synthesize(coefficients, self.low).T, self.low).T[:out, :wide])


def _even(size: int) -> int:
    return size + size % 2


@dataclass(frozen=True)
class WaveftTarget(ModuleTarget):
    """One module. `moments` is 0 where the values are the change itself."""

    count: int
    scale: float
    moments: int
    drawn: Drawn = field(compare=False)

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return [self.scale.hex(), self.moments, self.drawn.seed]

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        return {"spectrum": (self.count,)}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: positions are drawn."""
        return work_of(3 * self.count + 2 * self.moments, reading=DRAW * self.count)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        out, wide = self.size
        places, values = self.drawn.of(out * wide, self.count), tensors["spectrum"].float() * self.scale
        if not self.moments:
            return (Dense(add_at(places, values), out, wide),)
        return (Dense(AddWavelets(places, values, daubechies(self.moments).float()), out, wide),)


@dataclass(frozen=True)
class WaveftTuner(ModuleTuner):
    """See the module."""

    peft_type = "WAVEFT"
    kind = "waveft"
    marker = ".waveft_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS
        | {
            "n_frequency",
            "n_frequency_pattern",
            "proportional_parameters",
            "random_loc_seed",
            "scaling",
            "use_idwt",
            "wavelet_family",
        },
        ignorable=frozenset({"fan_in_fan_out", "init_weights"}),
    )
    smaller = "train fewer positions, or adapt fewer modules"
    endings: ClassVar = {"spectrum": ".waveft_spectrum"}

    count: int
    counts: Mapping[str, int]
    is_proportional: bool
    scale: float
    seed: int
    moments: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        family = config.raw.get("wavelet_family", "db1")
        is_transformed = config.flag("use_idwt", True)
        if is_transformed and (not isinstance(family, str) or family not in _FAMILIES):
            raise bad_key(
                "wavelet_family",
                f"{quote(family)} is not supported",
                f"train with one of {', '.join(_FAMILIES)}, or with use_idwt=False",
            )
        return {
            "count": config.amount("n_frequency", 2592),
            "counts": config.amounts("n_frequency_pattern"),
            "is_proportional": config.flag("proportional_parameters"),
            "scale": config.number("scaling", 25),
            "seed": config.seed("random_loc_seed", 777),
            "moments": _FAMILIES[str(family)] if is_transformed else 0,
        }

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """In proportion to the modules' sizes, `n_frequency` is their mean and the pattern counts for nothing."""
        counts = Patterned(self.count, self.counts, "n_frequency_pattern", budget)
        sizes = {name: module.in_features * module.out_features for name, module in modules.items()}
        total, drawn, targets = sum(sizes.values()), Drawn(self.seed, "n_frequency"), {}
        for name, module in modules.items():
            if self.is_proportional:
                # In this order: another one rounds otherwise.
                count = max(1, round(sizes[name] / total * (self.count * len(modules))))
            else:
                count = counts.of(name)
            check_fits("n_frequency", count, sizes[name], name)
            drawn.expect(sizes[name], count)
            targets[name] = WaveftTarget(module, count, self.scale, self.moments, drawn)
        return Targets(targets)

"""RoAd: pairs of outputs are rotated and scaled, the base's bias with them (Liao and Monz, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import ConfigKeys, PeftConfig, bad_key
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec

_ANGLES_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True, eq=False)
class RotateOutputs(WeightChange):
    """Row i becomes own[i] * W[i] + other[i] * (its partner's row): in each group the partners are a half apart, and
    the first half takes the second's negated. Takes two copies of W.
    """

    own: torch.Tensor  # [out], float32
    other: torch.Tensor  # [out]
    group: int

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return self._rotate(weight, self.own[:, None], self.other[:, None])

    def bias(self, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
        """See WeightChange: rotated as the outputs are."""
        return None if bias is None else self._rotate(bias, self.own, self.other)

    def _rotate(self, rows: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        halves = rows.view(-1, 2, self.group // 2, *rows.shape[1:])
        partners = torch.stack([-halves[:, 1], halves[:, 0]], dim=1).view(rows.shape)
        return torch.addcmul(rows * own, partners, other)


@dataclass(frozen=True)
class RoadTarget(ModuleTarget):
    """One module. `angles` per pair of outputs: 1 is a rotation, 2 and 4 are less and less so."""

    angles: int
    group: int

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.group

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See Target."""
        each = (self.size[0] * self.angles // 2,)
        return {"theta": each, "alpha": each}

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target."""
        return work_of(2 * self.size[0])

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        theta, alpha = tensors["theta"].float(), tensors["alpha"].float()
        own, other = alpha * theta.cos(), alpha * theta.sin()
        if self.angles == 1:
            # Both of a pair share the angle.
            own, other = (values.view(-1, 1, self.group // 2).expand(-1, 2, -1).reshape(-1) for values in (own, other))
        elif self.angles == 4:
            own, other = (
                values.view(-1, 2, self.group)[:, half].reshape(-1) for half, values in enumerate((own, other))
            )
        return (Dense(RotateOutputs(own, other, self.group), *self.size),)


@dataclass(frozen=True)
class RoadTuner(ModuleTuner):
    """See the module."""

    peft_type = "ROAD"
    kind = "road"
    marker = ".road_"
    keys = ConfigKeys(
        applied=frozenset({"group_size", "target_modules", "variant"}),
        ignorable=frozenset({"init_weights"}),
    )
    endings: ClassVar = {"theta": ".road_theta", "alpha": ".road_alpha"}

    angles: int
    group: int

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        group = config.rank("group_size", 64)
        if group % 2:
            raise bad_key("group_size", f"{group} is not even", "save the adapter again with PEFT")
        variant = config.choice("variant", tuple(_ANGLES_PER_PAIR), "road_1")
        return {"angles": _ANGLES_PER_PAIR[variant], "group": group}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """See ModuleTuner."""
        for name, module in modules.items():
            if module.out_features % self.group:
                raise AdapterIncompatible(
                    f"{CONFIG_FILE}: group_size {self.group} does not divide the {module.out_features} outputs of "
                    f"{quote(name)}",
                    subject=f"{CONFIG_FILE}: group_size",
                    remedy="upload an adapter made for this base",
                )
        return Targets({name: RoadTarget(module, self.angles, self.group) for name, module in modules.items()})

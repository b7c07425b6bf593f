"""RandLoRA: a change of full rank from random matrices that all modules share, scaled by vectors of each
(Albert et al., 2025).
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
from loramux_adapters.formats.peft.module_tuner import ModuleTarget, ModuleTuner, Shape, check_projection, check_rank
from loramux_adapters.formats.peft.tuner import Targets
from loramux_adapters.formats.peft.work import Work, work_of
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import Dense, WeightChange
from loramux_adapters.parts.part import Part
from loramux_adapters.spec import BaseModelSpec, ModuleSpec


@dataclass(frozen=True, eq=False)
class AddRandomBases(WeightChange):
    """W + B A, or its transpose, for A [n r, narrow] scaled by both vectors: narrow and wide are the smaller and the
    larger side of W, and n r is at least narrow.

    Takes out * in * min(out, in) products, as its rank is full, and three tensors of the size of W.
    """

    a: torch.Tensor  # [r, 1, narrow]
    b: torch.Tensor  # [wide, n, r]
    by_rank: torch.Tensor  # [r, n], float32
    by_column: torch.Tensor  # [n, narrow], float32, the scale in it

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange. PEFT counts A's rows rank by rank and B's columns base by base; so the products are."""
        a = (self.by_rank[:, :, None] * self.a.float() * self.by_column).flatten(0, 1)
        b = self.b.float().flatten(1)
        return weight.addmm_(b, a) if a.shape[1] == weight.shape[1] else weight.addmm_(a.T, b.T)


@dataclass(frozen=True)
class RandloraTarget(ModuleTarget):
    """One module's corner of the shared matrices."""

    r: int
    scale: float
    shared_a: Shape
    shared_b: Shape

    @property
    def arithmetic(self) -> Any:
        """See ModuleTarget."""
        return self.scale.hex()

    def shapes(self, found: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """PEFT writes the shared matrices once more for each module; a file without the copies means the same."""
        narrow = min(self.size)
        count = -(-narrow // self.r)
        copies = {"a": self.shared_a, "b": self.shared_b}
        return {"by_rank": (self.r, count), "by_column": (count, narrow)} | {
            role: shape for role, shape in copies.items() if role in found
        }

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: the bases are multiplied where the weight is made."""
        rows = -(-min(self.size) // self.r) * self.r
        return work_of(self.numbers(found), making=self.size[0] * self.size[1] * rows)

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Part, ...]:
        """See Target."""
        for role in ("a", "b"):
            if role in tensors and not torch.equal(tensors[role], tensors[f"shared_{role}"]):
                raise AdapterInvalid(
                    f"{WEIGHTS_FILE}: randlora_{role.upper()} of module {quote(self.module.name)} is not the one that "
                    "all modules share",
                    subject=f"{WEIGHTS_FILE}: {quote(self.module.name)}",
                    remedy="save the adapter again with PEFT",
                )
        narrow, wide = sorted(self.size)
        count = -(-narrow // self.r)
        change = AddRandomBases(
            tensors["shared_a"][:, :, :narrow],
            tensors["shared_b"][:wide, :count],
            tensors["by_rank"].float(),
            tensors["by_column"].float() * self.scale,
        )
        return (Dense(change, *self.size),)


@dataclass(frozen=True)
class RandloraTuner(ModuleTuner):
    """See the module."""

    peft_type = "RANDLORA"
    kind = "randlora"
    marker = ".randlora_"
    keys = ConfigKeys(
        applied=SELECTION_KEYS - {"exclude_modules"} | {"r", "randlora_alpha", "save_projection"},
        ignorable=frozenset(
            {"fan_in_fan_out", "init_weights", "projection_prng_key", "randlora_dropout", "sparse", "very_sparse"}
        ),
    )
    endings: ClassVar = {
        "by_rank": ".randlora_lambda",
        "by_column": ".randlora_gamma",
        "a": ".randlora_A",
        "b": ".randlora_B",
    }
    shared_names: ClassVar = {"shared_a": "base_model.randlora_A", "shared_b": "base_model.randlora_B"}

    r: int
    alpha: float

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """See ModuleTuner."""
        check_projection(config)
        return {"r": config.rank("r", 32), "alpha": config.number("randlora_alpha", 640)}

    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """The shared matrices are as large as the largest module."""
        check_rank(self.r, limits)
        out = max(module.out_features for module in modules.values())
        wide = max(module.in_features for module in modules.values())
        shared_a, shared_b = (self.r, 1, min(out, wide)), (max(out, wide), -(-min(out, wide) // self.r), self.r)
        scale = self.alpha / self.r
        return Targets(
            {name: RandloraTarget(module, self.r, scale, shared_a, shared_b) for name, module in modules.items()},
            {"shared_a": shared_a, "shared_b": shared_b},
        )

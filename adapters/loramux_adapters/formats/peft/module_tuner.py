"""What most methods share: a few tensors for each selected linear map, and options that are the same for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import PeftConfig, bad_key
from loramux_adapters.formats.peft.extras import Extras
from loramux_adapters.formats.peft.name_keys import DottedKeys, NameKeys
from loramux_adapters.formats.peft.selection import LINEAR, Selection, select_modules
from loramux_adapters.formats.peft.tuner import Shape, Target, Targets, Tuner
from loramux_adapters.formats.peft.work import Work, elements, work_of
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec

T = TypeVar("T")


class Patterned(Generic[T]):
    """A default, and other values for modules whose names match a key of `<name>_pattern`."""

    def __init__(
        self,
        default: T,
        pattern: Mapping[str, T],
        key: str,
        budget: RegexBudget,
        rule: type[NameKeys] | type[DottedKeys] = NameKeys,
    ) -> None:
        self._default, self._pattern = default, pattern
        self._keys = rule(pattern, f"{CONFIG_FILE}: {key}", budget)

    def of(self, name: str) -> T:
        """The value for one module. Raises AdapterInvalid when the budget runs out."""
        key = self._keys.find(name)
        return self._default if key is None else self._pattern[key]


@dataclass(frozen=True)
class ModuleTuner(Tuner):
    """One parsed config of such a method; subclasses add their options as fields."""

    endings: ClassVar[Mapping[str, str]]
    """Role -> the end of a tensor's name."""
    adaptable: ClassVar[tuple[ModuleKind, ...]] = LINEAR
    biases: ClassVar[tuple[str, ...]] = ("none",)
    """Values of `bias` with which PEFT's file holds what was trained."""

    selection: Selection
    bias: str
    extras: Extras

    @classmethod
    def parse(cls, raw: Mapping[str, object]) -> Self:
        """See Tuner."""
        config = PeftConfig(raw, cls.keys, cls.peft_type)
        bias = config.raw.get("bias", "none")
        if bias not in cls.biases and isinstance(bias, str) and (bias == "all" or bias.endswith("_only")):
            raise bad_key(
                "bias", f"{bias[:20]} trains biases that PEFT does not save for {cls.peft_type}", "use 'none'"
            )
        return cls(
            selection=Selection.parse(config),
            bias=config.choice("bias", cls.biases, "none"),
            extras=Extras.parse(config),
            **cls.options(config),
        )

    @classmethod
    def options(cls, config: PeftConfig) -> dict[str, Any]:
        """The method's own fields. Raises AdapterInvalid naming the key."""
        return {}

    @classmethod
    def suffixes(cls, kind: ModuleKind) -> Mapping[str, str]:
        """See Tuner."""
        return cls.endings

    def resolve(self, base: BaseModelSpec, limits: ReadLimits) -> Targets:
        """See Tuner."""
        budget = RegexBudget(limits)
        names = select_modules(self.selection, base, budget, self.adaptable).names
        return self.targets({name: base.modules[name] for name in names}, base, limits, budget)

    @abstractmethod
    def targets(
        self, modules: Mapping[str, ModuleSpec], base: BaseModelSpec, limits: ReadLimits, budget: RegexBudget
    ) -> Targets:
        """What the options say of the selected modules."""

    def arithmetic(self, targets: Targets) -> dict[str, Any]:
        """See Tuner: what each target says."""
        each = {name: target.arithmetic for name, target in targets.modules.items() if isinstance(target, ModuleTarget)}
        return {"kind": self.kind, "modules": each}


@dataclass(frozen=True)
class ModuleTarget(Target):
    """How one linear map is adapted."""

    module: ModuleSpec

    @property
    def arithmetic(self) -> Any:
        """What shapes and names of tensors do not say, as JSON; numbers as hexadecimal text."""
        return None

    @property
    def size(self) -> tuple[int, int]:
        """(out, in)"""
        return self.module.out_features, self.module.in_features

    def work(self, found: Mapping[str, Shape]) -> Work:
        """See Target: its tensors, and the low rank that comes of them."""
        return work_of(self.numbers(found))

    def numbers(self, found: Mapping[str, Shape]) -> int:
        """Of its tensors and its low rank together."""
        return elements(self.shapes(found).values()) + self.rank(found) * sum(self.size)


def check_projection(config: PeftConfig) -> None:
    """Raises AdapterInvalid where the random matrices that all modules share are not in the file."""
    if not config.flag("save_projection", True):
        raise bad_key(
            "save_projection",
            "the random matrices are not in the file, and another machine may draw others",
            "save with save_projection=True",
        )


def check_rank(rank: int, limits: ReadLimits, key: str = "r") -> None:
    """Raises AdapterIncompatible over the server's limit, of methods that take no rank rows."""
    if rank > limits.max_rank:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: {key} {rank} is over this server's limit of {limits.max_rank}",
            subject=f"{CONFIG_FILE}: {key}",
            remedy="train with a smaller rank",
        )


def fits_low_rank(rank: int, module: ModuleSpec, limits: ReadLimits) -> bool:
    """Whether a delta of this rank is better held as two factors than as a weight of its own."""
    out, wide = module.out_features, module.in_features
    return rank <= limits.max_rank and rank * (out + wide) < out * wide


__all__ = ["ModuleTarget", "ModuleTuner", "Patterned", "Shape", "check_projection", "check_rank", "fits_low_rank"]

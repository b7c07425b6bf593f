"""Which modules of a base a job adapts, with which rank and alpha: what PEFT chooses from the same words.

What PEFT would leave out in silence (a suffix, a layer or a pattern that names nothing) is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.config import Names
from loramux_adapters.formats.peft.name_keys import NameKeys
from loramux_adapters.formats.peft.selection import LINEAR, LINEAR_AND_EMBEDDING, Selection, select_modules
from loramux_adapters.spec import BaseModelSpec, ModuleKind, ModuleSpec
from loramux_trainer.errors import JobInvalid, Problems
from loramux_trainer.job import TrainConfig
from loramux_trainer.schema.adapter_config import LoraConfig, Targets
from loramux_trainer.schema.effect import LOW_RANK

T = TypeVar("T")

_TARGETED = ("lora", "rslora", "dora", "adalora", "vera", "loha", "lokr", "ia3", "galore")
"""Methods that train what lora.target_modules selects."""

_LIMITS = ReadLimits(regex_seconds=1.0)


class ModuleNames(Protocol):
    """What targets need of a base: a loaded one's spec has it, and the outline of one that is not loaded."""

    @property
    def model_id(self) -> str:
        """What messages call it."""
        ...

    @property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """By full name."""
        ...

    @property
    def head(self) -> str | None:
        """The output head's name."""
        ...


@dataclass(frozen=True)
class ModuleShape:
    """How one module is adapted. `scale`: what B A is multiplied by."""

    rank: int
    alpha: float
    scale: float


def modules_of(job: TrainConfig, base: ModuleNames) -> dict[str, ModuleShape]:
    """Those that the job's method adapts, see resolve_modules; none where it does not go by lora.target_modules."""
    if job.method not in _TARGETED:
        return {}
    return resolve_modules(job.lora, base, kinds=LINEAR_AND_EMBEDDING if job.method in LOW_RANK else LINEAR)


def resolve_targets(targets: Targets, base: ModuleNames) -> tuple[str, ...]:
    """Sorted names of the linear maps that `targets` chooses; see resolve_modules."""
    return tuple(resolve_modules(LoraConfig(target_modules=targets), base))


def resolve_modules(
    lora: LoraConfig, base: ModuleNames, *, kinds: Collection[ModuleKind] = LINEAR
) -> dict[str, ModuleShape]:
    """Name -> shape of the modules that `lora` chooses, sorted by name.

    `all-linear` is every linear map but the output head; a list matches whole trailing name parts; another string is
    a regular expression for the whole name. Raises JobInvalid when nothing, or something of another kind than `kinds`,
    matches, or a key would not take effect, and SeveralInvalid for several of them.
    """
    problems = Problems()
    targets = lora.target_modules
    if targets == "all-linear" and lora.layers_to_transform is not None:
        linear = {name for name in _linear(base) if name != base.head}
        targets = tuple(sorted({name.rpartition(".")[2] for name in linear}))
    for key, names in (("target_modules", targets), ("exclude_modules", lora.exclude_modules)):
        for suffix in names if isinstance(names, tuple) else ():
            if not any(name == suffix or name.endswith("." + suffix) for name in base.modules):
                problems.add(JobInvalid(f"lora.{key}", f"{suffix} names no module of {base.model_id}; {_known(base)}"))
    problems.raise_any()
    chosen = _select(lora, targets, base, lora.layers_to_transform)
    if not chosen:
        what = f"{lora.target_modules} matches no module of {base.model_id}"
        raise JobInvalid("lora.target_modules", f"{what}; {_known(base)}")
    for name in sorted(chosen):
        if base.modules[name].kind not in kinds:
            is_not = "neither a linear map nor an embedding" if "embedding" in kinds else "not a linear map"
            raise JobInvalid("lora.target_modules", f"{name} is {is_not}, and this method adapts nothing else")
    _check_layers(lora, targets, base)
    ranks = _by_pattern("rank_pattern", lora.rank_pattern, chosen, problems)
    alphas = _by_pattern("alpha_pattern", lora.alpha_pattern, chosen, problems)
    problems.raise_any()
    shapes = {}
    for name in sorted(chosen):
        rank, alpha = ranks.get(name, lora.rank), alphas.get(name, lora.alpha)
        shapes[name] = ModuleShape(rank, alpha, lora.scale(rank, alpha))
    return shapes


def _select(lora: LoraConfig, targets: Targets, base: ModuleNames, layers: Collection[int] | None) -> tuple[str, ...]:
    """Names by PEFT's rules, none where nothing matches."""
    pattern = lora.layers_pattern or ()
    selection = Selection(
        target_modules=_names(targets),
        exclude_modules=_names(lora.exclude_modules or ()),
        layers_to_transform=None if layers is None else frozenset(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
    )
    every: tuple[ModuleKind, ...] = ("linear", "conv1d", "embedding", "norm")
    try:
        return select_modules(selection, _spec(base), RegexBudget(_LIMITS), every).names
    except AdapterIncompatible:  # nothing matches
        return ()
    except AdapterInvalid as error:
        key, _, why = str(error).removeprefix("adapter_config.json: ").partition(": ")
        raise JobInvalid(f"lora.{key}", why, remedy=error.remedy) from error


def _check_layers(lora: LoraConfig, targets: Targets, base: ModuleNames) -> None:
    """A full name is taken whatever its layer is; of the suffixes, each layer must have one."""
    suffixes = tuple(name for name in targets if name not in base.modules)
    for layer in lora.layers_to_transform or ():
        if not suffixes or not _select(lora, suffixes, base, (layer,)):
            raise JobInvalid("lora.layers_to_transform", f"layer {layer} of {base.model_id} has none of the targets")


def _by_pattern(key: str, patterns: Mapping[str, T], names: Collection[str], problems: Problems) -> dict[str, T]:
    """Name -> value of the first pattern that matches it. Adds a problem for a pattern that decides nothing."""
    try:
        keys = NameKeys(patterns, f"lora.{key}", RegexBudget(_LIMITS))
        found = {name: pattern for name in names if (pattern := keys.find(name)) is not None}
    except AdapterInvalid as error:
        problems.add(JobInvalid(f"lora.{key}", str(error).partition(": ")[2], remedy=error.remedy))
        return {}
    for pattern in patterns.keys() - found.values():
        problems.add(JobInvalid(f"lora.{key}", f"{pattern} is the first match of no adapted module"))
    return {name: patterns[pattern] for name, pattern in found.items()}


def _names(targets: Targets) -> Names:
    return targets if isinstance(targets, str) else frozenset(targets)


def _spec(base: ModuleNames) -> BaseModelSpec:
    """`base` as the selection takes it, which reads names and kinds of modules only."""
    return BaseModelSpec(
        model_id=base.model_id,
        architecture="",
        fingerprint="",
        num_layers=0,
        hidden_size=0,
        vocab_size=0,
        context_length=0,
        tied_embeddings=False,
        embedding=None,
        head=base.head,
        modules=base.modules,
        parameters={},
    )


def _linear(base: ModuleNames) -> set[str]:
    return {name for name, module in base.modules.items() if module.kind in LINEAR}


def _known(base: ModuleNames) -> str:
    return "its linear maps end in " + ", ".join(sorted({name.rpartition(".")[2] for name in _linear(base)}))

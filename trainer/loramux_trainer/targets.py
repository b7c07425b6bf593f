"""Which modules of a base a job adapts. The same sets as PEFT chooses from the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import regex

from loramux_adapters.spec import ModuleSpec
from loramux_trainer.errors import JobInvalid, Problems
from loramux_trainer.job import Targets

_REGEX_SECONDS = 1.0


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


def resolve_targets(targets: Targets, base: ModuleNames) -> tuple[str, ...]:
    """Sorted names of the linear maps that `targets` chooses.

    `all-linear` is every linear map but the output head; a list matches whole trailing name parts; another string is
    a regular expression for the whole name. Raises JobInvalid when nothing, or something that is not linear, matches,
    and SeveralInvalid for several such suffixes.
    """
    if targets == "all-linear":
        return tuple(sorted(name for name in _linear(base) if name != base.head))
    if isinstance(targets, str):
        chosen = _matching(targets, base)
    else:
        chosen = {name for name in base.modules for suffix in targets if name == suffix or name.endswith("." + suffix)}
        problems = Problems()
        for suffix in targets:
            if not any(name == suffix or name.endswith("." + suffix) for name in base.modules):
                problems.add(
                    JobInvalid("lora.target_modules", f"{suffix} names no module of {base.model_id}; {_known(base)}")
                )
        problems.raise_any()
    if not chosen:
        raise JobInvalid("lora.target_modules", f"{targets} matches no module of {base.model_id}; {_known(base)}")
    for name in sorted(chosen - _linear(base)):
        raise JobInvalid("lora.target_modules", f"{name} is not a linear map: the trainer adapts linear maps only")
    return tuple(sorted(chosen))


def _matching(pattern: str, base: ModuleNames) -> set[str]:
    try:
        compiled = regex.compile(pattern)
        return {name for name in base.modules if compiled.fullmatch(name, timeout=_REGEX_SECONDS)}
    except regex.error as error:
        raise JobInvalid("lora.target_modules", f"{pattern!r} is not a regular expression: {error}") from error
    except TimeoutError as error:
        raise JobInvalid("lora.target_modules", f"{pattern!r} takes too long to match one module name") from error


def _linear(base: ModuleNames) -> set[str]:
    return {name for name, module in base.modules.items() if module.kind in ("linear", "conv1d")}


def _known(base: ModuleNames) -> str:
    return "its linear maps end in " + ", ".join(sorted({name.rpartition(".")[2] for name in _linear(base)}))

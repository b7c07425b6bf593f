"""The sections of a file of several jobs: what the fleet may take, and what a sweep goes over. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from loramux_adapters.validation import Section, Whole
from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.fields import Count


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both possible: whole ones where both are; `log`: even in the logarithm."""

    low: float
    high: float
    log: bool


Values = tuple[Any, ...] | Range
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")


def _parameters(value: object) -> Mapping[str, Values]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) and key for key in value):
        raise ValueError(f"must be a mapping of dotted keys to values, not {value!r}")
    return {key: _values(key, values) for key, values in value.items()}


def _values(key: str, values: object) -> Values:
    if isinstance(values, Range):
        return values
    if isinstance(values, (list, tuple)) and values:
        return tuple(values)
    if isinstance(values, Mapping) and {"min", "max"} <= values.keys() <= {"min", "max", "log"}:
        low, high, log = _number(values["min"]), _number(values["max"]), values.get("log", False)
        if low is not None and high is not None and isinstance(log, bool) and low < high and (low > 0 or not log):
            return Range(low, high, log)
        raise ValueError(f"{key} must have a min below its max, both above 0 with log: true, not {values!r}")
    raise ValueError(f"{key} must be a list of values, or a mapping of min, max and log, not {values!r}")


def _number(value: object) -> float | None:
    """YAML 1.1 reads 2e-4 as a string. A text that is a whole number is one: ranks are drawn from it."""
    try:
        number = (int(value) if _WHOLE.fullmatch(value) else float(value)) if isinstance(value, str) else value
    except ValueError:
        return None
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < float("inf")
    return number if is_number else None  # type: ignore[return-value]


@dataclass(frozen=True)
class FleetConfig(Section):
    """What trains at once: tokens of one micro-batch of all members together, and members; None: all jobs."""

    token_budget: Count = 2048
    max_members: Count | None = None


@dataclass(frozen=True)
class HalvingConfig(Section):
    """Successive halving by eval loss: after `min_steps` steps and each `eta`-fold of them, one in `eta` goes on."""

    min_steps: Count
    eta: Annotated[Whole, Field(ge=2)] = 3


@dataclass(frozen=True)
class SweepConfig(Section):
    """A sweep: every combination of the values (grid), or `trials` drawn ones; each with `repeat` seeds."""

    parameters: Annotated[Mapping[str, Any], BeforeValidator(_parameters)]
    search: Literal["grid", "random"] = "grid"
    trials: Count | None = None
    seed: Annotated[Whole, Field(ge=0)] | None = None  # of the drawing, None: 0; jobs have training.seed
    repeat: Count = 1
    successive_halving: HalvingConfig | None = None

    def __post_init__(self) -> None:
        if self.search == "random" and self.trials is None:
            raise JobInvalid("sweep.trials", "is required with search: random")
        if self.search == "grid" and self.trials is not None:
            raise JobInvalid("sweep.trials", "a grid has every combination; remove it, or use search: random")
        if self.search == "grid" and self.seed is not None:
            raise JobInvalid("sweep.seed", "a grid draws nothing; remove it: the jobs' own is training.seed")
        for key, values in self.parameters.items():
            if self.search == "grid" and isinstance(values, Range):
                raise JobInvalid(f"sweep.parameters.{key}", "a grid needs a list of values; or use search: random")

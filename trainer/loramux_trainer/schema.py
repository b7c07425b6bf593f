"""Plain values (from YAML) into frozen dataclasses, by their annotations; every refusal names the dotted key.

Knows no particular job.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from loramux_trainer.errors import JobInvalid, Problems


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, kept in a field's metadata; for a tuple they hold for each item."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    @property
    def metadata(self) -> dict[str, Bounds]:
        """For `dataclasses.field(metadata=...)`."""
        return {"bounds": self}

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, None when nothing is."""
        if not math.isfinite(value):
            return "must be finite"
        if value < self.low:
            return f"must be at least {self.low:g}"
        if value > self.high:
            return f"must be at most {self.high:g}"
        if value <= self.above:
            return f"must be above {self.above:g}"
        if value >= self.below:
            return f"must be below {self.below:g}"
        return None


@runtime_checkable
class Section(Protocol):
    """A dataclass whose values may contradict each other."""

    @classmethod
    def contradictions(cls, values: Mapping[str, Any]) -> Iterable[JobInvalid]:
        """What is wrong between `values`, defaults included; a value that is wrong by itself is left out."""
        ...


def build(cls: type[Any], values: Any, key: str, hints: Mapping[str, str]) -> Any:
    """An instance of the dataclass `cls`. Raises JobInvalid for a missing, unknown, mistyped or out-of-range value,
    and SeveralInvalid where there are several. `hints`: what is said of an unknown dotted key, and of `key=value`.
    """
    if not isinstance(values, Mapping):
        raise JobInvalid(key, f"must be a mapping of {', '.join(f.name for f in dataclasses.fields(cls))}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types_of = typing.get_type_hints(cls)
    problems = Problems()
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(fields)}"
            dotted = _join(key, str(name))
            problems.add(JobInvalid(dotted, hints.get(dotted, f"unknown key{hint}")))
    arguments = {}
    for name, field in fields.items():
        with problems.collecting():
            if name in values:
                bounds = field.metadata.get("bounds")
                arguments[name] = _convert(types_of[name], values[name], _join(key, name), bounds, hints)
            elif field.default is dataclasses.MISSING:
                raise JobInvalid(_join(key, name), "is required")
            else:
                arguments[name] = field.default
    if issubclass(cls, Section):
        for problem in cls.contradictions(arguments):
            problems.add(problem)
    problems.raise_any()
    return cls(**arguments)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _convert(hint: Any, value: Any, key: str, bounds: Bounds | None, hints: Mapping[str, str]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key, hints)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key, bounds, hints)
    if origin is Literal:
        if value not in arguments:
            refusal = f"must be one of {', '.join(arguments)}, not {value!r}"
            raise JobInvalid(key, hints.get(f"{key}={value}", refusal))
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, key, bounds, hints)
    return _convert_scalar(hint, value, key, bounds)


def _convert_union(
    arguments: tuple[Any, ...], value: Any, key: str, bounds: Bounds | None, hints: Mapping[str, str]
) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    for choice in choices:
        if isinstance(value, list) == (typing.get_origin(choice) is tuple):
            return _convert(choice, value, key, bounds, hints)
    raise JobInvalid(key, f"cannot be {value!r}")


def _convert_tuple(
    arguments: tuple[Any, ...], value: Any, key: str, bounds: Bounds | None, hints: Mapping[str, str]
) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise JobInvalid(key, f"must be a list, not {value!r}")
    variadic = len(arguments) == 2 and arguments[1] is Ellipsis
    if not variadic and len(value) != len(arguments):
        raise JobInvalid(key, f"must have {len(arguments)} items, not {len(value)}")
    item_hints = arguments[:1] * len(value) if variadic else arguments
    items, problems = [], Problems()
    for index, (hint, item) in enumerate(zip(item_hints, value, strict=True)):
        with problems.collecting():
            items.append(_convert(hint, item, f"{key}[{index}]", bounds, hints))
    problems.raise_any()
    return tuple(items)


def _convert_scalar(hint: Any, value: Any, key: str, bounds: Bounds | None) -> Any:
    if hint is Path:
        if not isinstance(value, (str, Path)) or not str(value):
            raise JobInvalid(key, f"must be a path, not {value!r}")
        return Path(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise JobInvalid(key, f"must be true or false, not {value!r}")
        return value
    if hint is str:
        if not isinstance(value, str) or not value:
            raise JobInvalid(key, f"must be a non-empty string, not {value!r}")
        return value
    return _convert_number(hint, value, key, bounds)


def _convert_number(hint: Any, value: Any, key: str, bounds: Bounds | None) -> float | int:
    number = value
    if isinstance(value, str):
        # YAML 1.1 reads 2e-4 as a string: a number was meant.
        try:
            number = float(value)
        except ValueError:
            raise JobInvalid(key, f"must be a number, not {value!r}") from None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise JobInvalid(key, f"must be a number, not {value!r}")
    problem = (bounds or Bounds()).problem(float(number))
    if problem is not None:
        raise JobInvalid(key, f"{problem}, not {value!r}")
    if hint is int:
        if number != int(number):
            raise JobInvalid(key, f"must be a whole number, not {value!r}")
        return int(number)
    return float(number)

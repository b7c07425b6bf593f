"""What pydantic finds wrong with plain values, in the words of our messages. The one place that translates them.

For files that a person writes: each finding is a dotted key and one rule, in the order of the fields. Knows no file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag, TypeAdapter, ValidationError

T = TypeVar("T")

_MOST_FINDINGS = 50
"""That are put into words. Of a file from a stranger there may be hundreds of thousands, each of which takes time."""


class Section:
    """Base of a dataclass that a mapping is read into: a key that is not a field is refused."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


_RULES = {
    "missing": "is required",
    "greater_than_equal": "must be at least {ge:g}, not {input!r}",
    "less_than_equal": "must be at most {le:g}, not {input!r}",
    "greater_than": "must be above {gt:g}, not {input!r}",
    "less_than": "must be below {lt:g}, not {input!r}",
    "finite_number": "must be finite, not {input!r}",
    "int_type": "must be a whole number, not {input!r}",
    "float_type": "must be a number, not {input!r}",
    "int_from_float": "must be a whole number, not {input!r}",
    "bool_type": "must be true or false, not {input!r}",
    "string_type": "must be a non-empty string, not {input!r}",
    "string_too_short": "must be a non-empty string, not {input!r}",
    "tuple_type": "must be a list, not {input!r}",
    "dict_type": "must be a mapping, not {input!r}",
    "value_error": "{error}",
}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")
_LIST, _ONE = "(list)", "(one)"


def _number(value: object) -> float:
    """A number, also as text: YAML 1.1 reads 2e-4 as a string."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"must be a number, not {value!r}")
    return number


def _not_empty(value: object) -> object:
    if value == "" or not isinstance(value, (str, Path)):
        raise ValueError(f"must be a path, not {value!r}")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Text = Annotated[str, Strict(), Field(min_length=1)]
FilePath = Annotated[Path, BeforeValidator(_not_empty)]
YesNo = Annotated[bool, Strict()]
OneOrMore = Annotated[
    Annotated[tuple[Text, ...], Tag(_LIST)] | Annotated[Text, Tag(_ONE)],
    Discriminator(lambda value: _LIST if isinstance(value, (list, tuple)) else _ONE),
]
"""A text, or a list of texts."""


class ValuesInvalid(ValueError):
    """Values do not fit; `findings` are (dotted key, what is wrong with it), in the order of the fields."""

    def __init__(self, findings: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {rule}" if key else rule for key, rule in findings))
        self.findings = tuple(findings)


def read(model: type[T], values: object, *, hints: Mapping[str, str] | None = None, at: str = "") -> T:
    """An instance of the dataclass `model`. Raises ValuesInvalid with what is wrong, the first of very many.

    `hints`: what is said of an unknown dotted key, and of `key=value`, in place of the rule. `at`: where the values
    are, a key that precedes theirs.
    """
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        found = _findings(model, values, error, hints or {}, (at,) if at else ())
        raise ValuesInvalid(list(itertools.islice(found, _MOST_FINDINGS))) from None


def _findings(
    model: type[Any], values: Any, error: ValidationError, hints: Mapping[str, str], at: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    for found in error.errors(include_url=False):
        path = [part for part in found["loc"] if part not in (_LIST, _ONE)]
        last = [
            str(part) if found["type"] in _UNKNOWN else part for part in path[-1:]
        ]  # YAML has keys that are numbers
        key, context = _dotted((*at, *path[:-1], *last)), found.get("ctx", {})
        value = None if found["type"] == "missing" else _given(values, path, found["input"])
        if found["type"] in _UNKNOWN:
            rule = hints.get(key) or _unknown(str(path[-1]), _known(model, path[:-1]))
        elif found["type"] == "dataclass_type":
            rule = f"must be a mapping of {', '.join(_known(model, path))}"
        elif found["type"] == "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            rule = hints.get(f"{key}={value}", f"must be one of {choices}, not {value!r}")
        else:
            rule = _RULES.get(found["type"], "{msg}").format(**{"input": value, "msg": found["msg"], **context})
        yield key, rule


def _given(values: Any, path: Sequence[int | str], validated: object) -> object:
    """What the person wrote at `path`; `validated` where that was not there: a default, or one word for a section."""
    try:
        return functools.reduce(lambda inner, part: inner[part], path, values)
    except (KeyError, TypeError):
        return validated


def _dotted(path: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _known(model: type[Any], path: Sequence[int | str]) -> tuple[str, ...]:
    """Keys of the section at `path`."""
    for part in path:
        model = get_args(model)[0] if isinstance(part, int) else get_type_hints(model)[part]
    return tuple(field.name for field in dataclasses.fields(model))


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known keys: {', '.join(known)}"

"""Python values into request fields: each checked by its own kind, and all that do not fit refused at once, by name.

What a message cannot hold is refused, and what every server refuses, so that one error names all of it; what depends
on the base and on a server's limits is the server's to check. Knows no channel.
"""

from __future__ import annotations

import ctypes
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from loramux.errors import ErrorDetails, FieldViolation, InvalidArgument

T = TypeVar("T", bound=Sized)

_UINT32 = (1 << 32) - 1
_OFF = "0 or unset means off"
_MOST_TOKENS = 1024  # with a bias, or that stop
_MOST_ADAPTERS = 16
_MOST_CHARACTERS = 256  # of a stop string or a salt

WHOLE: Mapping[str, tuple[int, int, str]] = {
    "top_k": (0, _UINT32, _OFF),
    "seed": (0, (1 << 64) - 1, "unset means that the server draws one"),
    "n": (1, _UINT32, "unset means 1"),
    "max_tokens": (1, _UINT32, "unset means what the context leaves"),
    "min_tokens": (0, _UINT32, _OFF),
    "logprobs": (0, _UINT32, "unset means none"),
    "prompt_logprobs": (0, _UINT32, "unset means none"),
    "priority": (-(1 << 31), (1 << 31) - 1, "lower runs first"),
}
"""Options that are whole numbers: what their fields may hold, and what to write in place of another API's -1."""


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, as float32: that is what is sent."""

    low: float
    high: float
    note: str = ""
    above: bool = False  # `low` itself is out of range


REAL: Mapping[str, Range] = {
    "temperature": Range(0.0, 100.0, "0 is greedy"),
    "top_p": Range(0.0, 1.0, "1 or unset means off", above=True),
    "min_p": Range(0.0, 1.0, _OFF),
    "repetition_penalty": Range(0.01, 10.0, "1 or unset means off"),
    "presence_penalty": Range(-2.0, 2.0, _OFF),
    "frequency_penalty": Range(-2.0, 2.0, _OFF),
}
BIAS = Range(-100.0, 100.0)
WEIGHT = Range(-100.0, 100.0)
_LEAST_WEIGHT = 1e-6
TTL = Range(0.0, 10 * 365 * 86_400, "that is 10 years, and None means that the adapter stays", above=True)
MAX_USES = (1, 1_000_000_000, "it must be from 1 to 1000000000, and None means no limit")
YES_OR_NO = frozenset({"include_stop", "ignore_eos", "return_token_ids", "echo"})
TEXTS = frozenset({"request_id", "cache_salt"})


class _WrongError(Exception):
    def __init__(self, why: str, below: str = "") -> None:
        super().__init__(why)
        self.below = below  # the part of the field, such as `[3]`


class Refusals:
    """Collects what is wrong with a request; leaving the `with` raises all of it as one InvalidArgument."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def add(self, field: str, why: str) -> None:
        """`field` does not fit."""
        self._violations.append(FieldViolation(field, why))

    def take(self, field: str, value: object, read: Callable[[Any], Any]) -> Any:
        """`read(value)`, or None and a refusal of `field`."""
        try:
            return read(value)
        except _WrongError as wrong:
            self.add(field + wrong.below, str(wrong))
            return None

    def raise_all(self) -> None:
        """Raise InvalidArgument where anything was refused."""
        if self._violations:
            message = "; ".join(f"{v.field}: {v.description}" for v in self._violations)
            raise InvalidArgument(message, ErrorDetails(reason="INVALID_REQUEST", violations=tuple(self._violations)))


@contextmanager
def refusing() -> Iterator[Refusals]:
    """Collect refusals inside, raise them at the end."""
    refusals = Refusals()
    yield refusals
    refusals.raise_all()


def read_option(name: str) -> Callable[[Any], Any]:
    """What reads the option `name`, one of the four tables above."""
    if name in WHOLE:
        low, high, note = WHOLE[name]
        return lambda value: _whole(value, low, high, note)
    if name in REAL:
        return lambda value: _real(value, REAL[name])
    if name in YES_OR_NO:
        return yes_or_no
    return salt if name == "cache_salt" else text


def _whole(value: Any, low: int, high: int, note: str) -> int:
    if isinstance(value, bool | str | bytes):
        raise _WrongError(f"{_shown(value)} is not a whole number; {note}")
    try:
        number = operator.index(value)
    except TypeError:
        raise _WrongError(f"{_shown(value)} is not a whole number; {note}") from None
    if not low <= number <= high:
        raise _WrongError(f"{number} is out of range; {note}")
    return number


def _real(value: Any, within: Range) -> float:
    if isinstance(value, bool | str | bytes):
        raise _WrongError(f"{_shown(value)} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _WrongError(f"{_shown(value)} is not a number") from None
    low, high, sent = (ctypes.c_float(part).value for part in (within.low, within.high, number))
    if not (low < sent if within.above else low <= sent) or not sent <= high:
        rule = (
            f"must be {'over' if within.above else 'from'} {low:g} {'and at most' if within.above else 'to'} {high:g}"
        )
        raise _WrongError(f"{number:g} is out of range: {rule}" + (f"; {within.note}" if within.note else ""))
    return number


def upload_options(ttl: float | None, max_uses: int | None, if_version: str | None) -> dict[str, Any]:
    """The optional fields of an upload, where given. InvalidArgument."""
    found: dict[str, Any] = {}
    with refusing() as refusals:
        if ttl is not None:
            found["ttl_seconds"] = refusals.take("ttl", ttl, lambda value: _real(value, TTL))
        if max_uses is not None:
            found["max_uses"] = refusals.take("max_uses", max_uses, lambda value: _whole(value, *MAX_USES))
        if if_version is not None:
            found["if_version"] = refusals.take("if_version", if_version, text)
    return found


def yes_or_no(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise _WrongError(f"{_shown(value)} is neither True nor False")
    return value


def text(value: Any) -> str:
    """A string of whole characters."""
    if not isinstance(value, str):
        raise _WrongError(f"{_shown(value)} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _WrongError(f"holds half a character at position {error.start}, which UTF-8 cannot spell") from None
    return value


def salt(value: Any) -> str:
    """A string that is not long."""
    return _at_most(text(value), _MOST_CHARACTERS, "characters")


def stop_strings(value: Any) -> list[str]:
    """A string, or several, none of them empty or long."""
    if isinstance(value, str):
        return [_stop_string(value)]
    return _each(value, _stop_string, "a string or a list of strings")


def stop_token_ids(value: Any) -> list[int]:
    """Ids of tokens, not many."""
    return _at_most(token_ids(value), _MOST_TOKENS, "ids")


def token_ids(value: Any) -> list[int]:
    """Ids of tokens."""
    return _each(value, _token, "a list of token ids")


def biases(value: Any) -> dict[int, float]:
    """Token ids to addends."""
    if not isinstance(value, Mapping):
        raise _WrongError(f"{_shown(value)} is not a mapping of token ids to numbers")
    _at_most(value, _MOST_TOKENS, "entries")
    return {
        _part(f"[{key!r}]", _token, key): _part(f"[{key!r}]", lambda addend: _real(addend, BIAS), addend)
        for key, addend in value.items()
    }


def adapter(value: Any) -> str:
    """A reference to one adapter."""
    if not isinstance(value, str):
        raise _WrongError(f"{_shown(value)} is no name of an adapter, and no mapping of names to weights")
    return text(value)


def adapters(value: Any) -> list[tuple[str, float]]:
    """References to adapters with their weights."""
    _at_most(value, _MOST_ADAPTERS, "adapters together")
    if not value:
        raise _WrongError("must not be empty; leave it out to ask the base")
    return [
        (
            _part(f"[{name!r}]", _reference, name),
            _part(f"[{name!r}]", _weight, weight),
        )
        for name, weight in value.items()
    ]


def _reference(value: Any) -> str:
    if not text(value):
        raise _WrongError("must not be empty")
    return value  # type: ignore[no-any-return]


def _weight(value: Any) -> float:
    number = _real(value, WEIGHT)
    if abs(number) < _LEAST_WEIGHT:
        raise _WrongError(f"{number:g} is too near 0: leave the adapter out")
    return number


def json_text(value: Any) -> str:
    """JSON that reads back as the same value."""
    try:
        return text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise _WrongError(f"cannot be written as JSON: {error}") from None


def _stop_string(value: Any) -> str:
    if not text(value):
        raise _WrongError("must not be empty")
    return _at_most(text(value), _MOST_CHARACTERS, "characters")


def _at_most(value: T, most: int, what: str) -> T:
    if len(value) > most:
        raise _WrongError(f"{len(value)} {what}, and {most} are allowed")
    return value


def _token(value: Any) -> int:
    return _whole(value, 0, _UINT32, "a token id is 0 or more")


def _each(value: Any, read: Callable[[Any], Any], what: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping):
        raise _WrongError(f"{_shown(value)} is not {what}")
    try:
        entries: Sequence[Any] = list(value)
    except TypeError:
        raise _WrongError(f"{_shown(value)} is not {what}") from None
    return [_part(f"[{index}]", read, entry) for index, entry in enumerate(entries)]


def _part(below: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except _WrongError as wrong:
        raise _WrongError(str(wrong), below + wrong.below) from None


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

"""One option of the configuration: its kind, its bounds, and how text becomes its value.

Knows no option by name; `config` declares them.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loramux_server.errors import ConfigInvalid

Kind = Literal["text", "flag", "count", "bytes", "seconds", "path", "address", "device"]

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})")
_LONGEST_SOCKET_PATH = 107  # bytes, with Linux; sun_path ends with a NUL
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Option:
    """What an option is; `low` and `high` are inclusive and in the option's own unit."""

    kind: Kind
    text: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    optional: bool = False


class _RefusedError(Exception):
    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy


def parse(name: str, option: Option, raw: object, origin: str) -> Any:
    """The value of `raw`, which came from `origin`. Raises ConfigInvalid with what, why and remedy."""
    try:
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            if option.optional:
                return None
            raise _RefusedError("must not be empty", f"leave {name} out to get its default")
        if isinstance(raw, (dict, list)):
            raise _RefusedError("must be one value", "see `loramux config show`")
        return _convert(option, raw)
    except _RefusedError as refused:
        raise ConfigInvalid(f"{name} = {raw!r} ({origin}): {refused.why}", remedy=refused.remedy) from None


def is_unix(address: str) -> bool:
    """Whether a valid address is that of a unix socket, `unix:PATH`."""
    return address.startswith("unix:")


def unix_path(address: str) -> str:
    """The path of a valid `unix:PATH` or `unix:///PATH`."""
    path = address.removeprefix("unix:")
    return path[2:] if path.startswith("//") else path


def split_address(address: str) -> tuple[str, int]:
    """Host and port of a valid `HOST:PORT` or `[v6]:PORT`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _convert(option: Option, raw: object) -> Any:
    match option.kind:
        case "flag":
            return _flag(raw)
        case "path":
            return Path(str(raw)).expanduser()
        case "address":
            return _address(str(raw).strip())
        case "device":
            if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(raw)):
                raise _RefusedError("unknown device", "use auto, cpu, cuda or cuda:N")
            return str(raw)
        case "text":
            if option.choices and raw not in option.choices:
                raise _RefusedError("unknown value", f"use one of {', '.join(option.choices)}")
            return str(raw)
        case "count":
            return _bounded(option, _count(raw))
        case "bytes":
            return _bounded(option, _size(raw))
        case "seconds":
            return _bounded(option, _seconds(raw))


def _bounded(option: Option, number: float) -> float:
    if option.low is not None and number < option.low:
        raise _RefusedError(f"must be at least {option.low:g}", "raise it")
    if option.high is not None and number > option.high:
        raise _RefusedError(f"must be at most {option.high:g}", "lower it")
    return number


def _flag(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word not in _TRUE | _FALSE:
        raise _RefusedError("is neither true nor false", "use true or false")
    return word in _TRUE


def _count(raw: object) -> int:
    text = str(raw).strip().replace("_", "")
    if isinstance(raw, bool) or not re.fullmatch(r"-?\d{1,18}", text):
        raise _RefusedError("is not a whole number", "give digits only")
    return int(text)


def _size(raw: object) -> int:
    match = None if isinstance(raw, bool) else _SIZE.fullmatch(str(raw).strip())
    if match is None or match[2].lower() not in _UNITS:
        raise _RefusedError("is not a size", "write bytes like 1073741824, 512MiB or 4GiB")
    unit = _UNITS[match[2].lower()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _seconds(raw: object) -> float:
    try:
        number = float(str(raw).strip())
    except ValueError:
        number = math.nan
    if isinstance(raw, bool) or not math.isfinite(number):
        raise _RefusedError("is not a number of seconds", "write it like 30 or 0.5")
    return number


def _address(text: str) -> str:
    if text == "none":
        return text
    if is_unix(text):
        return _unix_address(text)
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise _RefusedError("is not HOST:PORT", "write it like 127.0.0.1:50051, or unix:/run/loramux.sock")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise _RefusedError("the port must be 0 to 65535", "choose a free port, or 0 to let the system choose")
    return text


def _unix_address(text: str) -> str:
    path = unix_path(text)
    if not path or path.endswith("/"):
        raise _RefusedError("names no socket", "write it like unix:/run/loramux.sock")
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise _RefusedError(
            f"the path has {len(os.fsencode(path))} bytes, and a unix socket's has at most {_LONGEST_SOCKET_PATH}",
            "choose a shorter path",
        )
    return text

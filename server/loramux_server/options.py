"""Kinds of options: how text becomes a value, and what is said where it does not.

Knows no option by name; `config` declares them.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})")
_LONGEST_SOCKET_PATH = 107  # bytes, with Linux; sun_path ends with a NUL
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Kind:
    """The word that help shows for an option's value."""

    name: str


def refuse(why: str, remedy: str) -> NoReturn:
    """For validators: what is wrong with a value, and what to do."""
    raise PydanticCustomError("refused", "{why}", {"why": why, "remedy": remedy})


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


def _flag(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word not in _TRUE | _FALSE:
        refuse("is neither true nor false", "use true or false")
    return word in _TRUE


def _count(raw: object) -> int:
    text = str(raw).strip().replace("_", "")
    if isinstance(raw, bool) or not re.fullmatch(r"-?\d{1,18}", text):
        refuse("is not a whole number", "give digits only")
    return int(text)


def _size(raw: object) -> int:
    match = None if isinstance(raw, bool) else _SIZE.fullmatch(str(raw).strip())
    if match is None or match[2].lower() not in _UNITS:
        refuse("is not a size", "write bytes like 1073741824, 512MiB or 4GiB")
    unit = _UNITS[match[2].lower()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _seconds(raw: object) -> float:
    try:
        number = float(str(raw).strip())
    except ValueError:
        number = math.nan
    if isinstance(raw, bool) or not math.isfinite(number):
        refuse("is not a number of seconds", "write it like 30 or 0.5")
    return number


def _address(text: str) -> str:
    if text == "none":
        return text
    if is_unix(text):
        return _unix_address(text)
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        refuse("is not HOST:PORT", "write it like 127.0.0.1:50051, or unix:/run/loramux.sock")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        refuse("the port must be 0 to 65535", "choose a free port, or 0 to let the system choose")
    return text


def _unix_address(text: str) -> str:
    path = unix_path(text)
    if not path or path.endswith("/"):
        refuse("names no socket", "write it like unix:/run/loramux.sock")
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        refuse(
            f"the path has {len(os.fsencode(path))} bytes, and a unix socket's has at most {_LONGEST_SOCKET_PATH}",
            "choose a shorter path",
        )
    return text


def _device(raw: object) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(raw)):
        refuse("unknown device", "use auto, cpu, cuda or cuda:N")
    return str(raw)


Text = Annotated[str, Kind("text"), BeforeValidator(str)]
Flag = Annotated[bool, Kind("flag"), BeforeValidator(_flag)]
Count = Annotated[int, Kind("count"), BeforeValidator(_count)]
Bytes = Annotated[int, Kind("bytes"), BeforeValidator(_size)]
Seconds = Annotated[float, Kind("seconds"), BeforeValidator(_seconds)]
FilePath = Annotated[Path, Kind("path"), BeforeValidator(lambda raw: Path(str(raw)).expanduser())]
Address = Annotated[str, Kind("address"), BeforeValidator(lambda raw: _address(str(raw).strip()))]
Device = Annotated[str, Kind("device"), BeforeValidator(_device)]

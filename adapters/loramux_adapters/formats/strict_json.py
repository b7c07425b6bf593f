"""JSON from strangers: one object, no key twice, no NaN, bounded size and depth.

Knows no schema. Also refuses what Python's parser takes and other parsers do not (NaN, Infinity, -0 as
an integer), so that a file means the same to us and to the libraries that wrote it.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from os import fstat
from pathlib import Path
from typing import NoReturn

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.refusals import quote

_MAX_DEPTH = 16


class _Refused(ValueError):
    """Raised inside the parser's hooks; becomes the AdapterInvalid of `parse`."""


def read_object(path: Path, subject: str, max_bytes: int) -> dict[str, object]:
    """Read the file `path` as one JSON object of at most `max_bytes`; `subject` is its name in errors.

    Raises AdapterInvalid for the content, OSError when the disk fails.
    """
    with path.open("rb") as file:
        if not stat.S_ISREG(fstat(file.fileno()).st_mode):
            raise AdapterInvalid(f"{subject} is not a regular file", subject=subject)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise AdapterInvalid(
            f"{subject} is larger than {max_bytes} bytes", subject=subject, remedy="upload the file that PEFT wrote"
        )
    return parse(data, subject)


def parse(data: bytes, subject: str) -> dict[str, object]:
    """Parse UTF-8 bytes that hold one JSON object. Raises AdapterInvalid naming `subject`."""
    # A hook for every integer is slow; only a file with "-0" somewhere needs one.
    parse_int = _integer if b"-0" in data else int
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_int=parse_int
        )
    except UnicodeDecodeError:
        raise _invalid(subject, "is not UTF-8 text") from None
    except RecursionError:
        raise _invalid(subject, "is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _invalid(subject, f"is not JSON: {error.msg} at character {error.pos}") from None
    except _Refused as error:
        raise _invalid(subject, str(error)) from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise _invalid(subject, "holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise _invalid(subject, "is not a JSON object")
    _check_depth(value, subject)
    return value


def _check_depth(value: object, subject: str) -> None:
    level: list[dict[str, object] | list[object]] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for some in children for child in some if type(child) is dict or type(child) is list]
        if not level:
            return
    raise _invalid(subject, f"is nested deeper than {_MAX_DEPTH} levels")


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Refused(f"has the key {quote(twice)} twice")
    return result


def _constant(name: str) -> NoReturn:
    raise _Refused(f"holds {name}, which is not JSON")


def _integer(text: str) -> int:
    if text == "-0":
        raise _Refused("holds the integer -0")
    return int(text)


def _invalid(subject: str, what: str) -> AdapterInvalid:
    return AdapterInvalid(f"{subject} {what}", subject=subject, remedy="save the adapter again with PEFT")

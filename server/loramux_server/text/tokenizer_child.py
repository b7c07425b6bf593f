"""The child process that compares an adapter's tokenizer.json with the base's: a file of a stranger, of any content.

Reads two lengths and two JSON texts from its input, the adapter's first; writes the tokens that the adapter's adds, or
why it is refused. Builds no tokenizer of it: regular expressions and merges of a stranger are compared, not run.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

CPU_SECONDS = 8
MEMORY_BYTES = 2 << 30
NICENESS = 10  # steps of the model go first
MAX_CONTENT = 512
"""Characters of one token."""
MAX_ADDED, MAX_CHARACTERS = 1 << 14, 1 << 17
"""Added tokens, and characters of them all.

The library makes its matcher of them by one call, and nothing else in a server runs during it.
"""
_SETTINGS = ("version", "truncation", "padding", "added_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class Refused(ValueError):
    """Why the adapter's tokenizer is not the base's with added tokens."""


def compare(own: Any, base: Any, most: int) -> list[dict[str, Any]]:
    """The tokens that `own` adds, by rising id. Raises Refused."""
    if not isinstance(own, dict):
        raise Refused("it is no JSON object")
    for key in sorted({*own, *base} - {*_SETTINGS}):
        if _plain(own.get(key)) != _plain(base.get(key)):
            raise Refused(f"its {key[:40]!r} is not the base's")
    known = {entry["id"]: entry for entry in base.get("added_tokens", ())}
    own_tokens = own.get("added_tokens", ())
    if not isinstance(own_tokens, list):
        raise Refused("its 'added_tokens' are no list")
    added = []
    seen: set[int] = set()
    for entry in own_tokens:
        _check_entry(entry)
        if entry["id"] in seen:
            raise Refused(f"id {entry['id']} has two tokens")
        seen.add(entry["id"])
        base_entry = known.get(entry["id"])
        if base_entry is None:
            added.append({key: entry.get(key, False) for key in ("id", "content", *_FLAGS)})
        elif any(entry.get(key, False) != base_entry.get(key, False) for key in ("content", *_FLAGS)):
            raise Refused(f"its token {entry['id']} is {entry['content'][:40]!r}, the base's {base_entry['content']!r}")
    missing = sorted(known.keys() - seen)
    if missing:
        raise Refused(f"it lacks the base's token {known[missing[0]]['content']!r}")
    if len(added) > min(most, MAX_ADDED):
        raise Refused(f"it adds {len(added)} tokens, of at most {min(most, MAX_ADDED)}")
    characters = sum(len(entry["content"]) for entry in added)
    if characters > MAX_CHARACTERS:
        raise Refused(f"the tokens it adds have {characters} characters, of at most {MAX_CHARACTERS}")
    return sorted(added, key=lambda entry: entry["id"])


def _check_entry(entry: Any) -> None:
    is_entry = (
        isinstance(entry, dict)
        and type(entry.get("id")) is int
        and 0 <= entry["id"] < 1 << 31
        and isinstance(entry.get("content"), str)
        and 0 < len(entry["content"]) <= MAX_CONTENT
        and not any("\ud800" <= character <= "\udfff" for character in entry["content"])
        and all(isinstance(entry.get(key, False), bool) for key in _FLAGS)
    )
    if not is_entry:
        raise Refused(f"an entry of its 'added_tokens' is no token of 1 to {MAX_CONTENT} characters with an id")
    if entry["content"].isspace() and (entry.get("lstrip") or entry.get("rstrip")):
        # The library looks for the end of the blanks at each of them: in a text of blanks, time of its square.
        raise Refused(f"its token {entry['id']} is blank and takes blanks beside it (lstrip, rstrip)")


def _plain(value: Any) -> Any:
    """Without what versions of the library write or leave out: options that are off, and two ways to write merges."""
    if isinstance(value, dict):
        return {
            key: _merges(each) if key == "merges" else _plain(each)
            for key, each in value.items()
            if each is not None and each is not False
        }
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _merges(value: Any) -> Any:
    return list(_pairs(value)) if isinstance(value, list) else value


def _pairs(merges: list[Any]) -> Iterator[Any]:
    for merge in merges:
        yield tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def main() -> None:
    """One comparison."""
    os.nice(NICENESS)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, hard))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        first, _, most = map(int, sys.stdin.buffer.readline().split())
        own = sys.stdin.buffer.read(first)
        answer: dict[str, Any] = {"added": compare(json.loads(own), json.loads(sys.stdin.buffer.read()), most)}
    except Refused as error:
        answer = {"refused": str(error)}
    except (ValueError, RecursionError, TypeError, MemoryError) as error:
        answer = {"refused": f"it cannot be read ({type(error).__name__})"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

"""Which of an ordered set of pattern keys speaks for a module: PEFT's rule for rank_pattern and alpha_pattern.

PEFT takes the first key for which `re.match(rf"(.*\\.)?({key})$", name)` holds. Configs written by EVA or by our
trainer hold one full name per module, hundreds of them; such plain keys are looked up, only the rest are compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from loramux_adapters.formats.patterns import RegexBudget, SafePattern

_PLAIN = re.compile(r"(?P<anchor>\^?)(?P<text>[A-Za-z0-9_.]+)\$?")
_WORD = re.compile(r"[A-Za-z0-9_]+")

Dots = tuple[int, ...]


class NameKeys:
    """Ordered keys of one pattern field."""

    def __init__(self, keys: Iterable[str], subject: str, budget: RegexBudget) -> None:
        """Raises AdapterInvalid naming `subject` for a key that is not a safe pattern."""
        self._subject = subject
        self._budget = budget
        self._keys = list(keys)
        self._patterns: list[tuple[int, SafePattern]] = []
        # (anchored, length) -> [(positions of dots, {key: its place in the order})]; a dot in a key is any character
        self._plain: dict[tuple[bool, int], dict[Dots, dict[str, int]]] = {}
        for place, key in enumerate(self._keys):
            if found := _PLAIN.fullmatch(key):
                text = found["text"]
                dots = tuple(index for index, char in enumerate(text) if char == ".")
                group = self._plain.setdefault((bool(found["anchor"]), len(text)), {})
                group.setdefault(dots, {}).setdefault(text, place)
            else:
                self._patterns.append((place, SafePattern(rf"(.*\.)?({key})$", f"{subject} key", budget)))

    def find(self, name: str) -> str | None:
        """The first key that matches the module `name`. Raises AdapterInvalid when the budget runs out."""
        self._budget.remaining(self._subject)
        first = min(self._plain_places(name), default=len(self._keys))
        for place, pattern in self._patterns:
            if place < first and pattern.match(name) is not None:
                first = place
        return self._keys[first] if first < len(self._keys) else None

    def _plain_places(self, name: str) -> Iterator[int]:
        starts = [0, *(index + 1 for index, char in enumerate(name) if char == ".")]
        for start in starts:
            suffix = name[start:]
            for anchored in (False, True) if start == 0 else (False,):
                for dots, places in self._plain.get((anchored, len(suffix)), {}).items():
                    place = places.get(_with_dots(suffix, dots))
                    if place is not None:
                        yield place


class DottedKeys:
    """Ordered keys by another rule of PEFT's (C3A, FourierFT): the first for which `re.match(rf".*\\.{key}$", name)`
    holds, which none does that begins with the name; else the name itself, if it is a key.
    """

    def __init__(self, keys: Iterable[str], subject: str, budget: RegexBudget) -> None:
        """Raises AdapterInvalid naming `subject` for a key that is not a safe pattern."""
        self._subject, self._budget = subject, budget
        # A key without a pattern's signs is compared as text.
        self._keys: dict[str, SafePattern | None] = {
            key: None if _WORD.fullmatch(key) else SafePattern(rf".*\.{key}$", f"{subject} key", budget) for key in keys
        }

    def find(self, name: str) -> str | None:
        """The key that speaks for the module `name`. Raises AdapterInvalid when the budget runs out."""
        self._budget.remaining(self._subject)
        for key, pattern in self._keys.items():
            if name.endswith(f".{key}") if pattern is None else pattern.match(name) is not None:
                return key
        return name if name in self._keys else None


def _with_dots(text: str, dots: Dots) -> str:
    chars = list(text)
    for index in dots:
        chars[index] = "."
    return "".join(chars)

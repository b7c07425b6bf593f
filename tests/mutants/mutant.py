"""One fault that the code could have."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; with `new` in its place one of `tests` (files or test ids) must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

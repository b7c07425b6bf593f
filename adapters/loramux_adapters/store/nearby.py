"""What was meant by a name that a tenant does not have: the nearest of the names beside it in their order.

Bounded, since whoever asks for an absent adapter does so before anything is admitted, on the server's event loop: a
fixed number of names is read by an index, and each is compared in a time that its content cannot change. (difflib,
which finds the options of a configuration, takes a hundred times as long where a caller chose names of one letter.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

Read = Callable[[str, Mapping[str, Any]], Sequence[Sequence[Any]]]
"""Runs a statement and gives all of its rows."""

_SIDE: Final = 32  # names read before the absent one, and behind it
_MOST: Final = 3
_ALIKE: Final = 0.65

_BESIDE = """
SELECT * FROM (SELECT {column} FROM {table} WHERE tenant = :tenant AND {column} >= :name ORDER BY {column} LIMIT :side)
UNION SELECT * FROM (
    SELECT {column} FROM {table} WHERE tenant = :tenant AND {column} < :name ORDER BY {column} DESC LIMIT :side
)"""
_NAMES = _BESIDE.format(column="name", table="names")
_ALIASES = _BESIDE.format(column="alias", table="aliases")


def suggest(read: Read, tenant: str, name: str, *, aliases: bool) -> str:
    """`did you mean 'x'?` for a name that is absent, or nothing; `aliases`: they would do as well."""
    sql = f"{_NAMES} UNION {_ALIASES}" if aliases else _NAMES
    # Capitals sort before all others: a name is looked for among both.
    found = {
        row[0] for near in {name, name.lower()} for row in read(sql, {"tenant": tenant, "name": near, "side": _SIDE})
    }
    nearest = [repr(near) for near in find_nearest(name, found)]
    return f"did you mean {' or '.join(filter(None, (', '.join(nearest[:-1]), nearest[-1])))}?" if nearest else ""


def find_nearest(name: str, known: Iterable[str]) -> list[str]:
    """The most alike of `known`, at most three, those that are hardly alike left out."""
    places: dict[str, int] = {}
    for place, character in enumerate(name.lower()):
        places[character] = places.get(character, 0) | 1 << place
    alike = [(2 * _count_common(places, len(name), other.lower()) / (len(name) + len(other)), other) for other in known]
    ranked = sorted((-share, other) for share, other in alike if share >= _ALIKE)
    return [other for _, other in ranked[:_MOST]]


def _count_common(places: Mapping[str, int], length: int, other: str) -> int:
    """Characters of the longest common subsequence, by Hyyrö's bits: a zero is a character that was found in order."""
    whole = (1 << length) - 1
    left = whole
    for character in other:
        hit = left & places.get(character, 0)
        left = ((left + hit) | (left - hit)) & whole
    return length - left.bit_count()

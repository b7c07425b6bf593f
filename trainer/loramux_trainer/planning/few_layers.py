"""A base with its first layers only: its own files beside a configuration that says fewer.

transformers reads no weight of a layer that the configuration does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

_CONFIG = "config.json"
_COUNT = "num_hidden_layers"
_APART = 4  # layers, at least, between the two numbers that are measured


def layer_counts(base: Path) -> tuple[int, tuple[int, ...]]:
    """Of the base in a directory: its layers, and two numbers of them to measure, from which the whole follows in a
    straight line; one, all of them, for a small base. Where kinds of layers take turns, each number has whole turns.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    total = int(getattr(config, _COUNT))
    turn = _turn(list(getattr(config, "layer_types", None) or [None] * total))
    more = -(-_APART // turn) * turn
    return total, (total,) if total <= turn + more else (turn, turn + more)


def write_few_layers(base: Path, target: Path, layers: int) -> Path:
    """Writes into `target`, which must not exist, and returns it: links to the files in `base`, nothing copied."""
    target.mkdir()
    for path in base.iterdir():
        if path.is_file() and path.name != _CONFIG:
            (target / path.name).symlink_to(path.resolve())
    values = json.loads((base / _CONFIG).read_text(encoding="utf-8"))
    mapped = type(AutoConfig.from_pretrained(base, trust_remote_code=False)).attribute_map.get(_COUNT, _COUNT)
    _shorten(values, (_COUNT, mapped), layers)
    (target / _CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return target


def _turn(kinds: list[Any]) -> int:
    """After how many layers their kinds begin anew."""
    return next(
        (length for length in range(1, len(kinds)) if all(kinds[i] == kinds[i % length] for i in range(len(kinds)))),
        len(kinds),
    )


def _shorten(values: dict[str, Any], names: tuple[str, ...], layers: int) -> None:
    """In the configuration and in what is nested in it: the count, and lists of that length."""
    counts = {values[name] for name in names if isinstance(values.get(name), int)}
    for name, value in values.items():
        if name in names:
            values[name] = layers
        elif isinstance(value, list) and len(value) in counts:
            values[name] = value[:layers]
        elif isinstance(value, Mapping):
            _shorten(values[name], names, layers)

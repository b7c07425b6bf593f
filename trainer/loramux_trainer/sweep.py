"""What a sweep tries: combinations of values by dotted key, and what each is called. Pure; torch-free.

A drawn sweep is the same in every run: it has a seed of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.sweep_config import Range, SweepConfig, Values

MAX_JOBS = 1024
_MAX_NAME = 48  # leaves room for a seed in the 64 characters of an adapter's name
_DRAWS = 100  # for each trial, before distinct ones are taken to be over


def combinations(sweep: SweepConfig) -> tuple[dict[str, Any], ...]:
    """Dotted key -> value, one mapping a configuration, all distinct. Raises JobInvalid for too many or too few."""
    if sweep.search == "random":
        return tuple(_drawn(sweep))
    count = math.prod(len(values) for values in sweep.parameters.values())
    if count * sweep.repeat > MAX_JOBS:
        raise JobInvalid("sweep.parameters", f"make {count * sweep.repeat} jobs; at most {MAX_JOBS} can be in one file")
    grid = [dict(zip(sweep.parameters, each, strict=True)) for each in itertools.product(*sweep.parameters.values())]
    if len({_text(each) for each in grid}) < len(grid):
        raise JobInvalid("sweep.parameters", "a value is given twice; sweep.repeat trains one with several seeds")
    return tuple(grid)


def _drawn(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    trials = sweep.trials or 0
    if trials * sweep.repeat > MAX_JOBS:
        raise JobInvalid("sweep.trials", f"make {trials * sweep.repeat} jobs; at most {MAX_JOBS} can be in one file")
    chance, seen = random.Random(sweep.seed or 0), set[str]()
    for _ in range(trials * _DRAWS):
        if len(seen) == trials:
            return
        drawn = {key: _draw(values, chance) for key, values in sweep.parameters.items()}
        if _text(drawn) not in seen:
            seen.add(_text(drawn))
            yield drawn
    if len(seen) < trials:
        raise JobInvalid("sweep.trials", f"only {len(seen)} combinations are different, not {trials}; use a grid")


def _draw(values: Values, chance: random.Random) -> Any:
    if not isinstance(values, Range):
        return values[chance.randrange(len(values))]
    low, high = (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    number = low + (high - low) * chance.random()
    number = math.exp(number) if values.log else number
    is_whole = isinstance(values.low, int) and isinstance(values.high, int)
    # Four digits: what a name and a report show is the value itself.
    return min(max(round(number) if is_whole else float(f"{number:.4g}"), values.low), values.high)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def configuration_names(configurations: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    """A distinct name for each, of keys and values, that with a seed behind it can name an adapter."""
    names: list[str] = []
    for index, values in enumerate(configurations):
        parts = [f"{key.rpartition('.')[2]}-{_short(value)}" for key, value in values.items()]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))
        if len(name) > _MAX_NAME or name in names or not name[0].isalnum():
            name = f"{index}-{name}"[:_MAX_NAME]
        names.append(name)
    return tuple(names)


def _short(value: Any) -> str:
    return "_".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

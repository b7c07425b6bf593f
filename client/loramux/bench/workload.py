"""What is measured: one TOML file says the shape, the requests, the adapters, the scenarios and the rounds.

Prompts follow from the seed and the round, so every driver and peer gets the same work. Knows no driver.
"""

from __future__ import annotations

import dataclasses
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class WorkloadInvalid(Exception):
    """The workload file must be corrected; the message names the key."""


@dataclass(frozen=True)
class AdapterPlan:
    """The random LoRA adapters: all linears of the shape, at one rank."""

    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True)
class Scenario:
    """One mix: request i uses adapter i % distinct; 0 distinct adapters is the base alone."""

    name: str
    distinct: int


@dataclass(frozen=True)
class Workload:
    """`requests` run at once, each with `prompt_tokens` in and exactly `output_tokens` out, greedy."""

    name: str
    shape: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    warmup: int
    seed: int
    scenarios: tuple[Scenario, ...]
    adapters: AdapterPlan = AdapterPlan()

    @property
    def adapter_count(self) -> int:
        """Adapters that the widest scenario needs."""
        return max(scenario.distinct for scenario in self.scenarios)

    def prompts(self, round_number: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
        """Distinct random prompts of one round; ids below 3 are left to special tokens."""
        rng = random.Random(f"{self.seed}/{round_number}")
        return tuple(
            tuple(rng.randrange(3, vocabulary) for _ in range(self.prompt_tokens)) for _ in range(self.requests)
        )

    def assignment(self, scenario: Scenario) -> tuple[int | None, ...]:
        """Adapter number of each request, None for the base: neighbors differ."""
        if scenario.distinct == 0:
            return (None,) * self.requests
        return tuple(i % scenario.distinct for i in range(self.requests))


def shipped() -> tuple[str, ...]:
    """Names of the workloads that come with Loramux."""
    folder = resources.files("loramux.bench") / "workloads"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def read_workload(reference: str) -> Workload:
    """A shipped workload by name, or a TOML file by path. Raises WorkloadInvalid."""
    if reference in shipped():
        text = (resources.files("loramux.bench") / "workloads" / f"{reference}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(reference).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise WorkloadInvalid(
                f"cannot read the workload {reference}: {why}; shipped are {', '.join(shipped())}"
            ) from error
    return parse_workload(text)


def parse_workload(text: str) -> Workload:
    """A workload from TOML text. Raises WorkloadInvalid with the key."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WorkloadInvalid(f"not TOML: {error}") from error
    _check_keys("", values, {field.name for field in dataclasses.fields(Workload)})
    plan = values.get("adapters", {})
    _check_keys("adapters.", plan, {"rank", "alpha"})
    workload = Workload(
        name=_text(values, "name"),
        shape=_text(values, "shape"),
        requests=_count(values, "requests", low=1),
        prompt_tokens=_count(values, "prompt_tokens", low=1),
        output_tokens=_count(values, "output_tokens", low=2),
        rounds=_count(values, "rounds", low=1),
        warmup=_count(values, "warmup", low=0),
        seed=_count(values, "seed", low=0),
        scenarios=_scenarios(values.get("scenarios")),
        adapters=AdapterPlan(_count({"rank": 8} | plan, "rank", low=1), _positive({"alpha": 16.0} | plan, "alpha")),
    )
    if not _NAME.fullmatch(workload.name):
        raise WorkloadInvalid("name: use letters, digits, dot, dash and underscore; results are files of this name")
    if workload.adapter_count > workload.requests:
        raise WorkloadInvalid("scenarios: more distinct adapters than requests")
    return workload


def _scenarios(entries: object) -> tuple[Scenario, ...]:
    if not isinstance(entries, list) or not entries:
        raise WorkloadInvalid("scenarios: give at least one [[scenarios]] table")
    scenarios = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise WorkloadInvalid("scenarios: each must be a table")
        _check_keys("scenarios.", entry, {"name", "distinct"})
        scenarios.append(Scenario(_text(entry, "name"), _count(entry, "distinct", low=0)))
    if len({scenario.name for scenario in scenarios}) != len(scenarios):
        raise WorkloadInvalid("scenarios: names must differ")
    if scenarios[0].distinct != 0:
        raise WorkloadInvalid("scenarios: the first must be the base alone (distinct = 0): ratios are to it")
    return tuple(scenarios)


def _check_keys(prefix: str, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise WorkloadInvalid(f"{prefix}{unknown[0]}: unknown key; known are {', '.join(sorted(known))}")


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise WorkloadInvalid(f"{key}: must be text")
    return value


def _count(values: Mapping[str, Any], key: str, *, low: int) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise WorkloadInvalid(f"{key}: must be a whole number of at least {low}")
    return value


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise WorkloadInvalid(f"{key}: must be a positive number")
    return float(value)

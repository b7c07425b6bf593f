"""What is measured: one TOML file says the shape, the requests, the adapters, the scenarios and the rounds.

Prompts follow from the seed and the round, so every driver and peer gets the same work. Knows no driver.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict, ValidationInfo, field_validator

from loramux_adapters.names import NAME
from loramux_adapters.text_files import TextFileInvalid, parse_toml, read_text
from loramux_adapters.validation import Section, Text, ValuesInvalid, read


class WorkloadInvalid(Exception):
    """The workload file must be corrected; the message names the file and each wrong key. `remedy`: what to do."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


Count = Annotated[int, Strict(), Field(ge=1)]
CountFromZero = Annotated[int, Strict(), Field(ge=0)]


@dataclass(frozen=True)
class AdapterPlan(Section):
    """The random LoRA adapters: all linears of the shape, at one rank."""

    rank: Count = 8
    alpha: Annotated[float, Strict(), Field(gt=0)] = 16.0


@dataclass(frozen=True)
class Scenario(Section):
    """One mix: request i uses adapter i % distinct; 0 distinct adapters is the base alone."""

    name: Text
    distinct: CountFromZero


@dataclass(frozen=True)
class Workload(Section):
    """`requests` run at once, each with `prompt_tokens` in and exactly `output_tokens` out, greedy."""

    name: Text
    shape: Text
    requests: Count
    prompt_tokens: Count
    output_tokens: Annotated[int, Strict(), Field(ge=2)]
    rounds: Count
    warmup: CountFromZero
    seed: CountFromZero
    scenarios: tuple[Scenario, ...]
    adapters: AdapterPlan = AdapterPlan()

    @field_validator("name")
    @classmethod
    def _can_name_a_file(cls, name: str) -> str:
        if not NAME.allows(name):
            raise ValueError(f"must be {NAME.words}: results are files of this name")
        return name

    @field_validator("scenarios")
    @classmethod
    def _can_be_compared(cls, scenarios: tuple[Scenario, ...], others: ValidationInfo) -> tuple[Scenario, ...]:
        if not scenarios:
            raise ValueError("give at least one [[scenarios]] table")
        if len({scenario.name for scenario in scenarios}) != len(scenarios):
            raise ValueError("names must differ")
        if scenarios[0].distinct != 0:
            raise ValueError("the first must be the base alone (distinct = 0): ratios are to it")
        if max(scenario.distinct for scenario in scenarios) > others.data.get("requests", math.inf):
            raise ValueError("more distinct adapters than requests")
        return scenarios

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
            text = read_text(Path(reference))
        except OSError as error:
            raise WorkloadInvalid(
                f"cannot read the workload {reference}: {error.strerror}; shipped are {', '.join(shipped())}"
            ) from error
        except TextFileInvalid as error:
            raise WorkloadInvalid(str(error), remedy=error.remedy) from error
    return parse_workload(text, reference)


def parse_workload(text: str, name: str = "workload") -> Workload:
    """A workload from TOML text; `name` is the file's in messages. Raises WorkloadInvalid with every wrong key."""
    try:
        return read(Workload, parse_toml(text, name))
    except TextFileInvalid as error:
        raise WorkloadInvalid(str(error), remedy=error.remedy) from error
    except ValuesInvalid as error:
        raise WorkloadInvalid(f"{name}: {error}") from error

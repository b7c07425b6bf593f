"""What is measured: one TOML file says the shape, the requests, the adapters, the scenarios and the rounds.

Prompts and who asks for what follow from the seed and the round, so every driver and peer gets the same work. Knows
no driver.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, Strict, ValidationInfo, field_validator

from loramux.bench.driver import Call
from loramux_adapters.names import NAME
from loramux_adapters.text_files import TextFileInvalid, parse_toml, read_text
from loramux_adapters.validation import Section, Text, ValuesInvalid, read


class WorkloadInvalid(Exception):
    """The workload file must be corrected; the message names the file and each wrong key. `remedy`: what to do."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


S = TypeVar("S")

Count = Annotated[int, Strict(), Field(ge=1)]


def _can_name_a_file(name: str) -> str:
    if not NAME.allows(name):
        raise ValueError(f"must be {NAME.words}: results are files of this name")
    return name


FileName = Annotated[Text, AfterValidator(_can_name_a_file)]
CountFromZero = Annotated[int, Strict(), Field(ge=0)]
LORA, ALORA = "lora", "alora"
INVOCATION = (11, 12, 13)
"""The tokens that turn on the activated adapters of a bench."""


@dataclass(frozen=True)
class AdapterPlan(Section):
    """The random adapters: on all linears of the shape, LoRA at one rank unless a scenario says more."""

    rank: Count = 8
    alpha: Annotated[float, Strict(), Field(gt=0)] = 16.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the tensors in the files


@dataclass(frozen=True)
class Member:
    """One random adapter: the one with this number of its kind and rank."""

    kind: str
    rank: int
    number: int


@dataclass(frozen=True)
class Scenario(Section):
    """One mix. `distinct` adapters, 0 is the base alone; adapter i is of the i-th of `kinds` and `ranks`, cyclically.

    Request i uses adapter i % distinct (`turn`), or one by chance: each alike (`uniform`), or adapter i with a
    probability in proportion to (i + 1) ** -exponent (`zipf`). While they run, one request after the other asks for
    one of `beside` more adapters in turn, one token each.
    """

    name: Text
    distinct: CountFromZero
    kinds: tuple[Text, ...] = ()  # empty: LoRA
    ranks: tuple[Count, ...] = ()  # empty: the plan's
    draw: Literal["turn", "uniform", "zipf"] = "turn"
    exponent: Annotated[float, Strict(), Field(gt=0)] = 1.0
    beside: CountFromZero = 0


@dataclass(frozen=True)
class Workload(Section):
    """`requests`, each with `prompt_tokens` in and exactly `output_tokens` out, greedy; with `output_spread`, up to so
    many more or fewer, the same in every scenario: else all that began together end together.

    At most `at_once` of them are on their way (0: all); the next goes out when one is answered. Ratios are to the first
    scenario.
    """

    name: FileName
    shape: Text
    requests: Count
    prompt_tokens: Count
    output_tokens: Annotated[int, Strict(), Field(ge=2)]
    rounds: Count
    warmup: CountFromZero
    seed: CountFromZero
    scenarios: tuple[Scenario, ...]
    adapters: AdapterPlan = AdapterPlan()
    at_once: CountFromZero = 0
    output_spread: CountFromZero = 0
    settle: CountFromZero = 0  # requests of one token, drawn alike, before each run: what it would find anyway is there
    short_prompt_tokens: Count = 2  # of those and of the requests beside: a long one shows its prefill, not the load
    slots: CountFromZero = 0  # adapters of the plan that fit on the device; 0: what the server makes of its memory
    server: dict[Text, Text] = field(default_factory=dict)  # options of `loramux serve`
    keep_store: Annotated[bool, Strict()] = False  # in the cache, where pushing the adapters takes minutes

    @field_validator("scenarios")
    @classmethod
    def _can_be_compared(cls, scenarios: tuple[Scenario, ...], others: ValidationInfo) -> tuple[Scenario, ...]:
        if not scenarios:
            raise ValueError("give at least one [[scenarios]] table")
        if len({scenario.name for scenario in scenarios}) != len(scenarios):
            raise ValueError("names must differ")
        requests = others.data.get("requests")
        if requests and any(s.distinct > requests for s in scenarios if s.draw == "turn"):
            raise ValueError("more distinct adapters than requests")
        return scenarios

    @field_validator("output_spread")
    @classmethod
    def _leaves_two_tokens(cls, spread: int, others: ValidationInfo) -> int:
        length = others.data.get("output_tokens")
        if spread and length and spread > length - 2:
            raise ValueError(f"some answers of {length} tokens would have fewer than 2")
        return spread

    @property
    def is_static(self) -> bool:
        """Whether each scenario is one batch of LoRA that begins and ends together: what a peer can do."""
        plain = all(s.draw == "turn" and not s.beside and {*s.kinds} <= {LORA} for s in self.scenarios)
        return plain and not self.settle and not self.output_spread and self.most_at_once == self.requests

    @property
    def most_at_once(self) -> int:
        """Requests on their way at once, those beside left out."""
        return min(self.at_once or self.requests, self.requests)

    @property
    def members(self) -> tuple[Member, ...]:
        """Every adapter that some scenario needs, each once; calls name them by their place here."""
        found = (m for s in self.scenarios for m in (*self.members_of(s), *self.members_beside(s)))
        return tuple(dict.fromkeys(found))

    def members_of(self, scenario: Scenario) -> tuple[Member, ...]:
        """The adapters that the requests of a scenario ask for."""
        kinds, ranks = scenario.kinds or (LORA,), scenario.ranks or (self.adapters.rank,)
        return tuple(Member(kinds[i % len(kinds)], ranks[i % len(ranks)], i) for i in range(scenario.distinct))

    def members_beside(self, scenario: Scenario) -> tuple[Member, ...]:
        """The adapters that are asked for beside them."""
        return tuple(Member(LORA, self.adapters.rank, number) for number in range(scenario.beside))

    def prompts(self, round_number: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
        """Distinct random prompts of one round; ids below 3 are left to special tokens."""
        rng = random.Random(f"{self.seed}/{round_number}")
        return tuple(_prompt(rng, self.prompt_tokens, vocabulary) for _ in range(self.requests))

    def calls(self, scenario: Scenario, round_number: int, vocabulary: int) -> list[Call]:
        """The requests of one run: the same prompts in every scenario, but for what activates an activated adapter."""
        calls = self._calls(scenario, self.assignment(scenario, round_number), self.prompts(round_number, vocabulary))
        if not self.output_spread:
            return calls
        rng, least = random.Random(f"{self.seed}/{round_number}/lengths"), self.output_tokens - self.output_spread
        most = self.output_tokens + self.output_spread
        return [replace(call, output_tokens=rng.randint(least, most)) for call in calls]

    def calls_before(self, scenario: Scenario, round_number: int, vocabulary: int) -> list[Call]:
        """Those that let a run find what it would find after many others of its kind."""
        rng = random.Random(f"{self.seed}/{round_number}/settle")
        numbers = _draw(scenario, self.settle, rng)
        return self._calls(scenario, numbers, [_prompt(rng, self.short_prompt_tokens, vocabulary) for _ in numbers])

    def calls_beside(self, scenario: Scenario, round_number: int, vocabulary: int) -> list[Call]:
        """One request for each adapter beside, in an order by chance."""
        rng = random.Random(f"{self.seed}/{round_number}/beside")
        places = {member: place for place, member in enumerate(self.members)}
        members = list(self.members_beside(scenario))
        rng.shuffle(members)
        return [Call(_prompt(rng, self.short_prompt_tokens, vocabulary), places[member]) for member in members]

    def assignment(self, scenario: Scenario, round_number: int = 0) -> tuple[int | None, ...]:
        """Which of a scenario's adapters each request asks for, None for the base. In turn, neighbors differ."""
        return _draw(scenario, self.requests, random.Random(f"{self.seed}/{round_number}/draw"))

    def _calls(
        self, scenario: Scenario, numbers: Sequence[int | None], prompts: Sequence[tuple[int, ...]]
    ) -> list[Call]:
        places, members = {member: place for place, member in enumerate(self.members)}, self.members_of(scenario)
        calls = []
        for number, prompt in zip(numbers, prompts, strict=True):
            if number is None:
                calls.append(Call(prompt, None))
            else:
                is_activated = members[number].kind == ALORA
                calls.append(Call(_activated(prompt) if is_activated else prompt, places[members[number]]))
        return calls


def _draw(scenario: Scenario, count: int, rng: random.Random) -> tuple[int | None, ...]:
    if scenario.distinct == 0:
        return (None,) * count
    if scenario.draw == "turn":
        return tuple(i % scenario.distinct for i in range(count))
    exponent = scenario.exponent if scenario.draw == "zipf" else 0.0
    weights = list(accumulate((i + 1) ** -exponent for i in range(scenario.distinct)))
    return tuple(rng.choices(range(scenario.distinct), cum_weights=weights, k=count))


def _prompt(rng: random.Random, tokens: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocabulary) for _ in range(tokens))


def _activated(prompt: Sequence[int]) -> tuple[int, ...]:
    """Activated from the middle on: half of the prompt is computed as the base's."""
    middle = len(prompt) // 2
    return (*prompt[: max(0, middle - len(INVOCATION))], *INVOCATION, *prompt[middle:])


def shipped() -> tuple[str, ...]:
    """Names of the workloads of serving that come with Loramux."""
    return _names_in("workloads")


def shipped_training() -> tuple[str, ...]:
    """Names of those of training."""
    return _names_in("training_workloads")


def _names_in(folder: str) -> tuple[str, ...]:
    files = (resources.files("loramux.bench") / folder).iterdir()
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in files if entry.name.endswith(".toml")))


def workload_text(reference: str) -> str:
    """The text of a shipped workload by name, or of a TOML file by path. Raises WorkloadInvalid."""
    for folder, names in (("workloads", shipped()), ("training_workloads", shipped_training())):
        if reference in names:
            return (resources.files("loramux.bench") / folder / f"{reference}.toml").read_text(encoding="utf-8")
    try:
        return read_text(Path(reference))
    except OSError as error:
        known = ", ".join((*shipped(), *shipped_training()))
        raise WorkloadInvalid(f"cannot read the workload {reference}: {error.strerror}; shipped are {known}") from error
    except TextFileInvalid as error:
        raise WorkloadInvalid(str(error), remedy=error.remedy) from error


def read_workload(reference: str) -> Workload:
    """A workload of serving by name or path. Raises WorkloadInvalid."""
    return parse_workload(workload_text(reference), reference)


def parse_workload(text: str, name: str = "workload") -> Workload:
    """A workload from TOML text; `name` is the file's in messages. Raises WorkloadInvalid with every wrong key."""
    return parse_section(Workload, text, name)


def parse_section(section: type[S], text: str, name: str) -> S:
    """Any kind of workload from TOML text. Raises WorkloadInvalid."""
    try:
        return read(section, parse_toml(text, name))
    except TextFileInvalid as error:
        raise WorkloadInvalid(str(error), remedy=error.remedy) from error
    except ValuesInvalid as error:
        raise WorkloadInvalid(f"{name}: {error}") from error

"""What is measured of training: one TOML file says the shape, the members, their rows and the rounds.

A file with `admitted` counts members; any other one with `members` measures speed. Knows no process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from loramux.bench.workload import (
    Count,
    CountFromZero,
    FileName,
    WorkloadInvalid,
    parse_section,
    workload_text,
)
from loramux_adapters.text_files import TextFileInvalid, parse_toml
from loramux_adapters.validation import Section, Text

Products = Literal["float32", "bfloat16"]
Several = Annotated[tuple[Count, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a step of each of `members`, whose rows have `tokens`, on `threads`."""

    threads: int
    tokens: int
    members: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.threads} threads, {self.tokens} tokens, {self.members} members"


@dataclass(frozen=True)
class SpeedWorkload(Section):
    """Members with one LoRA of `rank` on all linears each, `rows` of `tokens` in a step, every token supervised: all in
    one fleet, one after another, and by PEFT one after another."""

    name: FileName
    shape: Text  # one of the bench's own, or the embedded base
    members: Several
    tokens: Several
    threads: Several
    rounds: Count
    warmup: CountFromZero
    seed: CountFromZero
    rank: Count = 16
    rows: Count = 1
    frozen_products: Annotated[tuple[Products, ...], Field(min_length=1)] = ("float32", "bfloat16")
    token_budget: Count = 2048

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Each combination once."""
        return tuple(itertools.starmap(Cell, itertools.product(self.threads, self.tokens, self.members)))


@dataclass(frozen=True)
class CountWorkload(Section):
    """`members` in one fleet that takes in `admitted` before each step, and then `steps` of all, against one member."""

    name: FileName
    shape: Text
    members: Count
    admitted: Count
    tokens: Count
    steps: Count
    threads: Count
    seed: CountFromZero
    rank: Count = 8
    rows: Count = 1
    token_budget: Count = 2048


def find_training(reference: str) -> SpeedWorkload | CountWorkload | None:
    """The workload of that name or path where it is one of training. Raises WorkloadInvalid."""
    text = workload_text(reference)
    try:
        keys = parse_toml(text, reference)
    except TextFileInvalid as error:
        raise WorkloadInvalid(str(error), remedy=error.remedy) from error
    if "admitted" in keys:
        return parse_section(CountWorkload, text, reference)
    return parse_section(SpeedWorkload, text, reference) if "members" in keys else None

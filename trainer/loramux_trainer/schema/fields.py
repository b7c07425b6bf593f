"""Kinds of values that keys of a job share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field

from loramux_adapters.formats.limits import MAX_RANK
from loramux_adapters.validation import Number, Whole


def two(value: object) -> object:
    """`value`, unless it is a list of another length than two: then ValueError."""
    if isinstance(value, (list, tuple)) and len(value) != 2:
        raise ValueError(f"must have 2 items, not {len(value)}")
    return value


def _rank_by_pattern(value: object) -> Mapping[str, int]:
    ranks = {}
    for pattern, rank in _patterns(value, "ranks").items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{pattern} must be a whole number from 1 to {MAX_RANK}, not {rank!r}")
        ranks[pattern] = rank
    return ranks


def _alpha_by_pattern(value: object) -> Mapping[str, float]:
    alphas = {}
    for pattern, alpha in _patterns(value, "alphas").items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
            raise ValueError(f"{pattern} must be a number above 0, not {alpha!r}")
        alphas[pattern] = float(alpha)
    return alphas


def _patterns(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ValueError(f"must be a mapping of name patterns to {what}, not {value!r}")
    return value


Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Whole, Field(ge=1)]
Index = Annotated[Whole, Field(ge=0)]
Rank = Annotated[Whole, Field(ge=1, le=MAX_RANK)]
RankPattern = Annotated[Mapping[str, int], BeforeValidator(_rank_by_pattern)]
AlphaPattern = Annotated[Mapping[str, float], BeforeValidator(_alpha_by_pattern)]
"""Name pattern -> rank or alpha, in the order that decides between two that match one module (PEFT's)."""

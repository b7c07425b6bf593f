"""Plain values into dataclasses: every rule in our words, by dotted key, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, Strict, ValidationInfo, field_validator

from loramux_adapters.validation import (
    FilePath,
    Number,
    OneOrMore,
    Section,
    Text,
    ValuesInvalid,
    Whole,
    YesNo,
    read,
)


@dataclass(frozen=True)
class Inner(Section):
    path: FilePath
    share: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    rate: Annotated[Number, Field(gt=0, le=2)] = 1.0


@dataclass(frozen=True)
class Outer(Section):
    name: Text
    parts: tuple[Inner, ...]
    kind: Literal["a", "b", "c"] = "a"
    count: Annotated[Whole, Field(ge=1)] | None = 1
    exact: Annotated[int, Strict()] = 0
    weight: Annotated[float, Strict()] = 1.0
    sure: YesNo = False
    names: OneOrMore = "all"

    @field_validator("count")
    @classmethod
    def _is_not_thirteen(cls, count: int | None, others: ValidationInfo) -> int | None:
        if count == 13 and others.data.get("kind") == "b":
            raise ValueError("is unlucky")
        return count


GOOD: dict[str, Any] = {"name": "n", "parts": [{"path": "p"}]}


def test_values_become_what_the_fields_say() -> None:
    values = {**GOOD, "count": "2e1", "weight": 3, "names": ["x", "y"], "parts": [{"path": "p", "share": "2.5e-1"}]}
    assert read(Outer, values) == Outer("n", (Inner(Path("p"), 0.25),), count=20, weight=3.0, names=("x", "y"))
    assert read(Outer, {**GOOD, "count": None, "names": "x"}).count is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ""}, "name: must be a non-empty string, not ''"),
        ({"name": 3}, "name: must be a non-empty string, not 3"),
        ({"parts": "p"}, "parts: must be a list, not 'p'"),
        ({"parts": [{}]}, "parts[0].path: is required"),
        ({"parts": ["p"]}, "parts[0]: must be a mapping of path, share, rate"),
        ({"parts": [{"path": ""}]}, "parts[0].path: must be a path, not ''"),
        ({"parts": [{"path": "p", "share": -1}]}, "parts[0].share: must be at least 0, not -1"),
        ({"parts": [{"path": "p", "share": "1e0"}]}, "parts[0].share: must be below 1, not '1e0'"),
        ({"parts": [{"path": "p", "rate": 0}]}, "parts[0].rate: must be above 0, not 0"),
        ({"parts": [{"path": "p", "rate": 3}]}, "parts[0].rate: must be at most 2, not 3"),
        ({"parts": [{"path": "p", "rate": "nan"}]}, "parts[0].rate: must be finite, not 'nan'"),
        ({"parts": [{"path": "p", "shere": 0}]}, "parts[0].shere: unknown key; did you mean share?"),
        ({"parts": [{"path": "p", 7: 0}]}, "parts[0].7: unknown key; known keys: path, share, rate"),
        ({"kind": "d"}, "kind: must be one of a, b, c, not 'd'"),
        ({"kind": "z"}, "kind: 'z' is now a"),
        ({"old": 1}, "old: is now name"),
        ({"count": 1.5}, "count: must be a whole number, not 1.5"),
        ({"count": True}, "count: must be a number, not True"),
        ({"count": "many"}, "count: must be a number, not 'many'"),
        ({"count": 13, "kind": "b"}, "count: is unlucky"),
        ({"exact": "1"}, "exact: must be a whole number, not '1'"),
        ({"weight": "1"}, "weight: must be a number, not '1'"),
        ({"sure": "yes"}, "sure: must be true or false, not 'yes'"),
        ({"names": ["x", ""]}, "names[1]: must be a non-empty string, not ''"),
        ({"names": 3}, "names: must be a non-empty string, not 3"),
    ],
)
def test_each_rule_is_said_in_our_words(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValuesInvalid) as caught:
        read(Outer, {**GOOD, **change}, hints={"old": "is now name", "kind=z": "'z' is now a"})
    assert str(caught.value) == says


def test_everything_wrong_is_said_at_once_below_the_key_that_is_given() -> None:
    with pytest.raises(ValuesInvalid) as caught:
        read(Outer, {"kind": "b", "count": 13, "parts": [{"path": 1}, {"rate": 9}], "nmae": "n"}, at="top")
    assert [key for key, _ in caught.value.findings] == [
        "top.name", "top.parts[0].path", "top.parts[1].path", "top.parts[1].rate", "top.count", "top.nmae",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [None, 3, "text", []])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    with pytest.raises(ValuesInvalid, match=r"^must be a mapping of name, parts, "):
        read(Outer, values)


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Choice(Section):
    name: Literal["a", "b"]
    size: Annotated[int | None, Field(validate_default=True)] = None

    @field_validator("size")
    @classmethod
    def _is_there_for_b(cls, size: int | None, others: ValidationInfo) -> int | None:
        if size is None and others.data.get("name") == "b":
            raise ValueError("is required with b")
        return size


@dataclass(frozen=True)
class Chooser(Section):
    choice: Annotated[Choice, BeforeValidator(_named)]


@pytest.mark.parametrize(
    ("choice", "finding"),
    [
        ("c", ("choice.name", "must be one of a, b, not 'c'")),
        ({"name": "b"}, ("choice.size", "is required with b")),
        ("b", ("choice.size", "is required with b")),
    ],
)
def test_a_finding_where_nothing_was_written_is_told_too(choice: object, finding: tuple[str, str]) -> None:
    """One word that stands for a section, and a default that does not fit what was written."""
    with pytest.raises(ValuesInvalid) as caught:
        read(Chooser, {"choice": choice})
    assert caught.value.findings == (finding,)


def test_of_very_many_findings_the_first_are_put_into_words() -> None:
    """A stranger's file of a megabyte took 17 seconds otherwise."""
    with pytest.raises(ValuesInvalid) as caught:
        read(Chooser, {"choice": "a", **{f"key-{number}": 1 for number in range(1000)}})
    assert len(caught.value.findings) == 50

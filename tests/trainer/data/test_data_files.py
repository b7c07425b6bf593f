"""Files of every form into values with their lines, and what cannot be read with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.files import read_values
from loramux_trainer.errors import DataInvalid, Problems

ONE, TWO = {"prompt": "ä", "completion": "b"}, {"messages": [{"role": "user", "content": "x\ny"}]}


def _read(tmp_path: Path, name: str, text: str, encoding: str = "utf-8") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_text(text, encoding=encoding, newline="")
    return list(read_values(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t"])
def test_a_json_array_gives_the_line_of_each_element(tmp_path: Path, name: str, encoding: str) -> None:
    compact, indented = json.dumps([ONE, TWO]), json.dumps([ONE, TWO], indent=2)
    assert _read(tmp_path, name, compact, encoding) == [(1, ONE), (1, TWO)]
    assert _read(tmp_path, name, "\n" + indented + "\n\n", encoding) == [(3, ONE), (7, TWO)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "t.json:1: a JSON array without a record"),
        ("\n[\n\n]", "t.json:4: a JSON array without a record"),
        ('[\n{"a": 1},\n{"a" 1}]', "t.json:3: not JSON: Expecting ':' delimiter at column 6"),
        ('[\n{"a": 1}\n{"a": 1}]', "t.json:3: not JSON: a comma, or the ] that ends the array, is missing"),
        ('[{"a": 1}', "t.json:1: not JSON: a comma, or the ] that ends"),
        ('[{"a": 1},\n]', "t.json:2: not JSON: Expecting value"),
        ("[", "t.json:1: not JSON: Expecting value"),
        ('[{"a": 1}]\n[{"a": 1}]', "t.json:2: more text after the JSON array"),
        ('[\n{"a": 1, "a": 2}]', "t.json:2: the key 'a' is given twice"),
        ('[\n{"a": NaN}]', "t.json:2: NaN is neither text nor a number"),
        ("[\n" + "[" * 100_000, "t.json:2: not JSON that can be read"),
        ("[\n" + "9" * 5000 + "]", "t.json:2: not JSON that can be read"),
    ],
)
def test_a_broken_array_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataInvalid) as caught:
        _read(tmp_path, "t.json", text)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(says)


def test_not_a_number_is_refused_by_its_line(tmp_path: Path) -> None:
    path, problems = tmp_path / "t.jsonl", Problems()
    path.write_text('{"a": 1}\n{"a": NaN}\n{"a": -Infinity}\n{"a": 2}\n')
    assert [line for line, _ in read_values(path, problems)] == [1, 4]
    with pytest.raises(DataInvalid, match=r"t\.jsonl:2: NaN is neither text nor a number: write null"):
        list(read_values(path))


def test_a_table_gives_its_rows_with_their_lines(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["prompt", " completion"], ['a, "b"', "c\nd"], ["", "e" * 200_000]])
    assert list(read_values(tmp_path / "t.csv")) == [
        (2, {"prompt": 'a, "b"', "completion": "c\nd"}),
        (4, {"prompt": "", "completion": "e" * 200_000}),
    ]
    assert _read(tmp_path, "t.tsv", "a\tb\r\n\r\n1\t2,3\r\n") == [(3, {"a": "1", "b": "2,3"})]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "a,b\n1,2\n1\n", "t.csv:3: has 1 cells, the first line names 2 columns"),
        ("t.csv", "a,b\n1,2,3\n", "t.csv:2: has 3 cells"),
        ("t.csv", "a,a\n1,2\n", "t.csv:1: the column 'a' is there twice"),
        ("t.csv", "a;b\n1;2\n", "t.csv:1: one column, 'a;b': columns are separated by ',' here, not ';'"),
        ("t.tsv", "a,b\n1,2\n", "t.tsv:1: one column, 'a,b': columns are separated by '\\t' here, not ','"),
        ("t.csv", ",a\n0,1\n", "t.csv:1: column 1 has no name: give it one, or leave it out (pandas: index=False)"),
        (
            "t.csv",
            "prompt,chosen\nx,\"[{'content': 'a', 'role': 'user'}]\"\n",
            "t.csv:2: chosen has messages as Python prints them: write them with json.dumps",
        ),
        ("t.csv", 'chosen\n"[{""role"": ""user"", ""content"": 1"\n', "t.csv:2: not JSON"),
        ("t.csv", 'a,b\n1,2\n"x,3\n', "t.csv:3: not a table that can be read"),
        ("t.csv", "a,b\n", "t.csv: has no record"),
        ("t.csv", "", "t.csv: has no record"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataInvalid) as caught:
        _read(tmp_path, name, text)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(says)


def test_messages_in_a_cell_are_messages_and_other_json_is_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'say "x"\n'}], [{"from": "human", "value": "ä"}, {"from": "gpt", "value": "b"}]
    texts = ['[{"value": 3, "unit": "m"}]', '{"role": "user", "content": "a"}', "[{'value': 3}]", "[1]"]
    cells = [*map(json.dumps, turns), *texts]
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "d", "e", "f"], cells])
    [(_, value)] = read_values(tmp_path / "t.csv")
    assert list(value.values()) == [*turns, *texts]


def test_json_lines_by_the_name_of_a_table_are_read(tmp_path: Path) -> None:
    assert _read(tmp_path, "t.csv", json.dumps(ONE)) == [(1, ONE)]

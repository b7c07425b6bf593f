"""Lines into records: what is honored, what is refused by its key, and which other formats are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.errors import DataInvalid, Problems, SeveralInvalid
from loramux_trainer.records import Completion, Conversation, RecordInvalid, parse_record, read_records

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def _conversation(*messages: Any, **others: Any) -> Conversation:
    record = parse_record({"messages": list(messages), **others})
    assert isinstance(record, Conversation)
    return record


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_a_turn_can_be_left_out_of_the_loss(off: dict[str, Any]) -> None:
    record = _conversation(USER, {**ANSWER, **off}, {**USER, "weight": 0}, {**ANSWER, "weight": 1})
    assert record.trained == (3,)
    assert record.messages == (USER, ANSWER, USER, ANSWER)  # a template does not see them
    assert _conversation(USER, ANSWER, USER, {**ANSWER, "weight": None, "train": True}).trained == (1, 3)


def test_tools_and_what_messages_hold_reach_the_template() -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "so", "name": "me"}
    result = {"role": "tool", "content": "3", "tool_call_id": "1"}
    record = _conversation(USER, said, result, ANSWER, tools=[{"type": "function"}])
    assert record.messages == (USER, said, result, ANSWER)
    assert record.tools == ({"type": "function"},)
    assert _conversation(USER, ANSWER, tools=[]).tools is None


def test_keys_that_say_nothing_are_passed_over() -> None:
    empty = {"id": None, "tags": [], "meta": {}, "note": "", "flag": False, "messages": None, "tools": []}
    assert parse_record({"prompt": "a", "completion": "b", **empty}) == Completion("a", "b")
    assert _conversation({**USER, "refusal": None}, ANSWER, prompt=None, completion=None).trained == (1,)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "completion": "b", "id": 0}, r"id is not a key that training reads \(prompt, completion, "),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight is not a key"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, r"messages\[1\]\.refusal is not a key that training reads"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, "either messages, or prompt and completion, not both"),
        ({"messages": [USER, ANSWER], "completion": "a"}, "not both"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools belong to messages"),
        ({"prompt": [USER], "completion": [ANSWER]}, "join them into one list under messages"),
        ({"messages": [USER, ANSWER], "tools": "f"}, "tools must be a list of objects"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\]\.weight must be 0 or 1, not 0\.5"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, r"messages\[1\]\.train must be true or false, not 'no'"),
        ({"messages": [USER, {**ANSWER, "weight": 0, "train": True}]}, "contradict each other"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\] is the user's: only the assistant's turns"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no turn of the assistant is trained"),
        ({"messages": [{**USER, "content": None}, ANSWER]}, r"messages\[0\] needs a role and a content string"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] needs a role and a content"),
        ({"conversations": []}, "a ShareGPT record: rename conversations to messages"),
        ({"instruction": "a", "input": "", "output": "b"}, "an Alpaca record: write instruction and input into prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"a preference record \(chosen, rejected\)"),
        ({"text": "a"}, "a record of plain text"),
        ({"prompt": "a", "completion": "b", "label": False}, r"a KTO record \(label\)"),
    ],
)
def test_what_would_be_passed_over_is_refused_by_its_key(record: Any, says: str) -> None:
    with pytest.raises(RecordInvalid, match=says):
        parse_record(record)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "completion": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(DataInvalid, match=r"t\.jsonl:1: the key '\w+' is given twice"):
        list(read_records(path))


RECORD = {"prompt": "ä", "completion": "b"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.json", json.dumps([RECORD]).encode(), r"a JSON array: .* \(jq -c '\.\[\]' t\.json > t\.jsonl\)"),
        ("t.jsonl", json.dumps([RECORD], indent=2).encode(), r"a JSON array: .*t\.jsonl > t\.lines\.jsonl"),
        ("t.json", json.dumps(RECORD, indent=2).encode(), r"a JSON object over several lines: .*jq -c \. t\.json"),
        ("t.jsonl", json.dumps(RECORD).encode("utf-16"), "UTF-16, not UTF-8: save it as UTF-8"),
        ("t.csv", b"prompt,completion\na,b\n", r"a table \(\.csv\): JSON Lines are needed"),
        ("t.parquet", b"PAR1\x15\x04", "a Parquet file"),
        ("t.jsonl.gz", gzip.compress(b"{}"), "compressed by gzip: unpack it first"),
    ],
    ids=["array", "array of lines", "object", "utf-16", "csv", "parquet", "gzip"],
)
def test_files_of_another_form_are_named_with_the_remedy(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataInvalid, match=says):
        list(read_records(tmp_path / name))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(RECORD, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    assert list(read_records(path)) == [(1, Completion("ä", "b"))]


def test_every_bad_line_is_collected_the_first_ones_told_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    path.write_text("x\n" + good + "[1]\n" + good)
    problems = Problems()
    assert [line for line, _ in read_records(path, problems)] == [2, 4]
    with pytest.raises(SeveralInvalid) as caught:
        problems.raise_any()
    assert [problem.line for problem in caught.value.problems if isinstance(problem, DataInvalid)] == [1, 3]
    path.write_text(good + "{\n" * 1000)
    many, outer = Problems(), Problems()
    assert len(list(read_records(path, many))) == 1
    with outer.collecting():
        many.raise_any()
    with pytest.raises(SeveralInvalid) as crowd:
        outer.raise_any()
    lines = str(crowd.value).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (22, "1000 things are wrong:", "  and 980 more")


def test_a_file_of_bad_lines_alone_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("x\n")
    problems = Problems()
    assert list(read_records(path, problems)) == []
    with pytest.raises(DataInvalid, match=r"t\.jsonl:1: not JSON"):
        problems.raise_any()

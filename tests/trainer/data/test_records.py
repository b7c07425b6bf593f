"""Lines into records: what is honored, what is refused by its key, and which other formats are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.record_types import Completion, Conversation, Judged, RecordInvalid, Tokens
from loramux_trainer.data.records import _COMPLETION, _FORMATS, parse_record, read_records
from loramux_trainer.errors import DataInvalid, Problems, SeveralInvalid
from loramux_trainer.schema.data_config import RECORD_KEYS, DataConfig
from loramux_trainer.schema.loss_config import LossConfig
from support.tiny import write_jsonl

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


def test_an_empty_cell_of_a_table_says_nothing() -> None:
    """Of two kinds of records in one table, each has the other's cells empty."""
    messages = json.dumps([USER, ANSWER])
    cells = {"tools": "", "input_ids": " ", "conversations": "", "id": ""}
    assert parse_record({"messages": "", "prompt": "a", "completion": "b", **cells}) == Completion("a", "b")
    assert parse_record({"messages": " ", "text": "a", **cells}) == Completion("", "a")
    record = parse_record({"messages": messages, "prompt": "", "completion": "", **cells})
    assert isinstance(record, Conversation)
    assert (record.messages, record.tools) == ((USER, ANSWER), None)
    with pytest.raises(RecordInvalid, match="a record needs either messages, or prompt and completion"):
        parse_record({"messages": "", **cells})


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "completion": "b", "id": 0}, r"id is not a key that training reads \(prompt, completion, "),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight is not a key"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, r"messages\[1\]\.refusal is not a key that training reads"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, "either messages, or prompt and completion, not both"),
        ({"messages": [USER, ANSWER], "completion": "a"}, "not both"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "tools belong to messages"),
        ({"messages": [USER, ANSWER], "tools": "f"}, "tools must be a list of objects"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\]\.weight must be 0 or 1, not 0\.5"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, r"messages\[1\]\.train must be true or false, not 'no'"),
        ({"messages": [USER, {**ANSWER, "weight": 0, "train": True}]}, "contradict each other"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\] is the user's: only the assistant's turns"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no turn of the assistant is trained"),
        ({"messages": [{**USER, "content": None}, ANSWER]}, r"messages\[0\] needs a role and a content string"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] needs a role and a content"),
        ({"prompt": [USER], "completion": "a"}, "must be strings, or both lists of messages"),
        (
            {"prompt": [{**USER, "weight": 1}], "completion": [ANSWER]},
            r"prompt\[0\] is the user's: only the assistant's",
        ),
        (
            {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]},
            r"prompt\[1\] is of the prompt, which carries no loss: remove its weight",
        ),
        ({"prompt": [USER], "completion": [ANSWER, USER]}, "the last message of completion must be the assistant's"),
        ({"text": ""}, "text is empty or no string"),
        ({"text": "a", "label": 2}, r"label must be true \(a desirable answer\) or false, not 2"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "label must be true"),
        ({"messages": [USER, {**ANSWER, "weight": 1}], "label": True}, r"messages\[1\] has a weight, and label judges"),
        ({"input_ids": [1, 2], "label": False}, "label is not a key that training reads beside input_ids"),
        ({"input_ids": []}, "input_ids must be a list of ids"),
        ({"input_ids": [1, -1]}, "none of them negative"),
        ({"input_ids": [1, True]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [1.0]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 numbers, input_ids has 2"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3: it must be input_ids\[1\], or -100 for no loss"),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "leave the padding out of input_ids"),
        ({"input_ids": [1, 2], "completion_mask": [-100, 1]}, "completion_mask must have 0 and 1 only, not -100"),
        ({"text": "a", "\ud800": 1}, r"the key '\\ud800' has half a character at position 0"),
        ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]}, "either labels or completion_mask, not"),
        ({"messages": "[{"}, "messages is not JSON that can be read"),
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
        ("t.json", json.dumps(RECORD, indent=2).encode(), r"a JSON object over several lines: .*jq -c \. t\.json"),
        ("t.jsonl", json.dumps(RECORD).encode("utf-16"), "UTF-16, not UTF-8: save it as UTF-8"),
        ("t.parquet", b"PAR1\x15\x04", "a Parquet file"),
        ("t.jsonl.gz", gzip.compress(b"{}"), "compressed by gzip: unpack it first"),
    ],
    ids=["object", "utf-16", "parquet", "gzip"],
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


def test_prompt_and_completion_may_be_messages() -> None:
    record = parse_record(
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER], "tools": [{"name": "f"}]}
    )
    assert isinstance(record, Conversation)
    assert record.messages == (USER, ANSWER, USER, ANSWER, USER, ANSWER)
    assert (record.trained, record.tools) == ((3, 5), ({"name": "f"},))


def test_plain_text_is_learned_from_its_begin() -> None:
    assert parse_record({"text": "a b"}) == Completion("", "a b")
    assert parse_record({"text": "", "prompt": "a", "completion": "b"}) == Completion("a", "b")


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("False", False)])
def test_a_label_judges_the_answer(label: object, good: bool) -> None:
    record = parse_record({"prompt": "a", "completion": "b", "label": label})
    assert record == Judged(Completion("a", "b"), good)
    chat = parse_record({"messages": [USER, ANSWER, USER, ANSWER], "label": label})
    assert isinstance(chat, Judged)
    assert (chat.answer.trained, chat.label) == ((3,), good)  # type: ignore[union-attr]


def test_token_ids_are_learned_where_labels_or_masks_say() -> None:
    ids = [5, 6, 7]
    assert parse_record({"input_ids": ids, "attention_mask": [1, 1, 1]}) == Tokens((5, 6, 7), (5, 6, 7))
    assert parse_record({"input_ids": ids, "labels": [-100, 6, 7]}) == Tokens((5, 6, 7), (-100, 6, 7))
    masks = {"completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}
    assert parse_record({"input_ids": ids, **masks}) == Tokens((5, 6, 7), (-100, -100, 7))


def test_json_in_a_text_is_opened() -> None:
    record = parse_record({"messages": json.dumps([USER, ANSWER]), "tools": json.dumps([{"name": "f"}])})
    assert isinstance(record, Conversation)
    assert (record.messages, record.tools) == ((USER, ANSWER), ({"name": "f"},))


def test_columns_of_the_file_get_our_names(tmp_path: Path) -> None:
    def data(**options: Any) -> DataConfig:
        return DataConfig(tmp_path / "t.jsonl", **options)

    columns = {"prompt": "question", "completion": "best"}
    value = {"question": "a", "best": "b", "score": 3}
    named = data(columns=columns, ignore_columns=("score",))
    assert parse_record(value, named) == Completion("a", "b")
    with pytest.raises(RecordInvalid, match=r"score is not a key .* or name it in data\.ignore_columns"):
        parse_record(value, data(columns=columns))
    with pytest.raises(RecordInvalid, match=r"prompt is there, and data\.columns reads question as it"):
        parse_record({**value, "prompt": "c"}, named)
    write_jsonl(tmp_path / "t.jsonl", [value, value])
    assert [line for line, _ in read_records(tmp_path / "t.jsonl", data=named)] == [1, 2]
    wrong = data(columns={**columns, "tools": "functions"}, ignore_columns=("score",))
    with pytest.raises(DataInvalid, match=r"t\.jsonl: no record has functions, which data\.columns reads as tools"):
        list(read_records(tmp_path / "t.jsonl", data=wrong))


def test_the_keys_that_columns_can_give_are_those_that_are_read() -> None:
    assert set(RECORD_KEYS) == {key for form in (*_FORMATS.values(), _COMPLETION) for key in form.keys}


ONE, JUDGED, PAIR = RECORD, {**RECORD, "label": True}, {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("loss", "value", "says"),
    [
        (
            "sft",
            PAIR,
            r"a preference record \(chosen, rejected\), and loss sft needs answers .*: set loss: dpo or",
        ),
        ("sft", JUDGED, r"a KTO record \(label\), .*: set loss: kto, or keep the good answers, without label"),
        ("dpo", ONE, r"a record with one answer, and loss dpo needs pairs: prompt, chosen and rejected: set loss: sft"),
        ("orpo", JUDGED, r"a KTO record \(label\), and loss orpo needs pairs"),
        ("kto", ONE, r"a record with one answer, and loss kto needs a label \(true or false\) beside each answer"),
        ("kto", {"input_ids": [1]}, r"a record of token ids \(input_ids\), and loss kto needs a label"),
    ],
)
def test_a_loss_without_its_records_is_refused_once(tmp_path: Path, loss: Any, value: Any, says: str) -> None:
    path, problems = write_jsonl(tmp_path / "t.jsonl", [value] * 3), Problems()
    with pytest.raises(DataInvalid, match=rf"t\.jsonl:1: {says}"):
        list(read_records(path, problems, loss=LossConfig(loss)))
    assert not problems


def test_a_record_of_another_kind_among_right_ones_is_named_with_its_line(tmp_path: Path) -> None:
    path, problems = write_jsonl(tmp_path / "t.jsonl", [PAIR, ONE, JUDGED, PAIR]), Problems()
    assert [line for line, _ in read_records(path, problems, loss=LossConfig("kto"))] == [1, 3, 4]
    with pytest.raises(DataInvalid, match=r"t\.jsonl:2: a record with one answer"):
        problems.raise_any()

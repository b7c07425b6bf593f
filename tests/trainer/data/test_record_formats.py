"""Alpaca and ShareGPT records: the prompts and messages that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.record_types import Completion, Conversation, Judged, RecordInvalid
from loramux_trainer.data.records import parse_record
from loramux_trainer.schema.data_config import DataConfig

ALPACA = DataConfig(Path("t"), instruction_format="alpaca")


def _conversation(value: Any) -> Conversation:
    record = parse_record(value)
    assert isinstance(record, Conversation)
    return record


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_an_instruction_is_a_user_message() -> None:
    record = _conversation({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert record.messages == (
        _message("system", "Be brief."),
        _message("user", "Add.\n1 2"),
        _message("assistant", "3"),
    )
    assert record.trained == (2,)
    plain = _conversation({"instruction": "Add.", "input": "", "output": "3", "system": None})
    assert plain.messages == (_message("user", "Add."), _message("assistant", "3"))


def test_an_instruction_may_be_written_as_stanford_did() -> None:
    with_input = parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, ALPACA)
    assert with_input == Completion(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n",
        "3",
    )
    without = parse_record({"instruction": "Go.", "output": "ok", "system": "Be brief."}, ALPACA)
    assert without == Completion("Be brief.\n\n### Instruction:\nGo.\n\n### Response:\n", "ok")
    assert isinstance(parse_record({"instruction": "Go.", "output": "ok", "label": False}, ALPACA), Judged)


def test_turns_of_sharegpt_are_messages() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    record = _conversation(
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "ho", "weight": 0},
                {"role": "user", "content": "and"},
                {"from": "gpt", "value": "end"},
            ],
            "tools": json.dumps([{"name": "f"}]),
        }
    )
    assert record.messages == (
        _message("system", "Be brief."),
        _message("user", "hi"),
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        _message("tool", "7"),
        _message("assistant", "ho"),
        _message("user", "and"),
        _message("assistant", "end"),
    )
    assert (record.trained, record.tools) == ((2, 6), ({"name": "f"},))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": ""}, "output is empty or no string"),
        ({"instruction": "a"}, "output is empty or no string"),
        ({"instruction": "a", "input": 3, "output": "b"}, "instruction, input, system must be strings"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history is not a key that training reads"),
        ({"instruction": "a", "input": 0, "output": "b"}, "instruction, input, system must be strings"),
        (
            {"conversations": [{"from": ["human"], "value": "a"}]},
            r"conversations\[0\]\.from must be one of system, human",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "parameters": {"x": 1}}'}]},
            r"conversations\[0\]\.value: parameters is not a key that training reads \(name, arguments\)",
        ),
        ({"conversations": []}, "conversations must be a non-empty list"),
        ({"conversations": [{"from": "boss", "value": "a"}]}, r"conversations\[0\]\.from must be one of system, human"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] needs a role and a content string"),
        ({"conversations": [{"from": "human", "value": "a", "x": 1}]}, r"conversations\[0\]\.x is not a key"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "the last message of conversations must be the assist"),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            r"conversations\[0\]\.value must be the",
        ),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, r"conversations\[0\]\.value must be the"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, says: str) -> None:
    with pytest.raises(RecordInvalid, match=says):
        parse_record(value)

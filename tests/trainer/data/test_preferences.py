"""Pairs of answers in every form that trl reads, and those of Alpaca and ShareGPT."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.record_types import Completion, Conversation, Pair, RecordInvalid
from loramux_trainer.data.records import parse_record
from loramux_trainer.schema.data_config import DataConfig

ASK = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in "yn")
SYSTEM = {"role": "system", "content": "s"}


def _pair(value: Any, data: DataConfig | None = None) -> Pair:
    record = parse_record(value, data)
    assert isinstance(record, Pair)
    return record


def _turns(pair: Pair) -> list[tuple[tuple[Any, ...], tuple[int, ...]]]:
    assert isinstance(pair.chosen, Conversation)
    assert isinstance(pair.rejected, Conversation)
    return [(side.messages, side.trained) for side in (pair.chosen, pair.rejected)]


def test_an_explicit_prompt_is_the_same_for_both() -> None:
    assert _pair({"prompt": "p ", "chosen": "a", "rejected": "b"}) == Pair(Completion("p ", "a"), Completion("p ", "b"))
    expected = [((ASK, YES), (1,)), ((ASK, NO), (1,))]
    assert _turns(_pair({"prompt": [ASK], "chosen": [YES], "rejected": [NO]})) == expected
    assert _turns(_pair({"prompt": [ASK], "chosen": "y", "rejected": "n"})) == expected
    tools = _pair({"prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": [{"name": "f"}]})
    assert isinstance(tools.rejected, Conversation)
    assert tools.rejected.tools == ({"name": "f"},)


def test_earlier_turns_of_the_assistant_are_context() -> None:
    long = [ASK, YES, ASK]
    assert _turns(_pair({"prompt": long, "chosen": [YES, ASK, NO], "rejected": [NO]})) == [
        ((*long, YES, ASK, NO), (3, 5)),
        ((*long, NO), (3,)),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),
        ("The sky is blue", "The sky is black", "The sky is"),  # trl cuts inside of the word
        ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c", "Human: a\n\nAssistant:"),
        ("a cat", "a cat sat", "a"),
        ("yes", "no", ""),
        ("a\nb", "a\nc", "a"),
    ],
)
def test_an_implicit_prompt_ends_before_the_last_blank_in_common(chosen: str, rejected: str, prompt: str) -> None:
    pair = _pair({"chosen": chosen, "rejected": rejected})
    assert pair == Pair(Completion(prompt, chosen[len(prompt) :]), Completion(prompt, rejected[len(prompt) :]))


@pytest.mark.skipif(find_spec("trl") is None, reason="trl, whose border is compared with, is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "value",
    [
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        {"chosen": "Human: a\n\nAssistant: b c", "rejected": "Human: a\n\nAssistant: d"},
    ],
)
def test_where_words_differ_the_border_is_that_of_trl(value: dict[str, str]) -> None:
    from trl import extract_prompt

    theirs = extract_prompt(value)
    pair = _pair(value)
    assert pair.chosen == Completion(theirs["prompt"], theirs["chosen"])
    assert pair.rejected == Completion(theirs["prompt"], theirs["rejected"])


def test_an_implicit_prompt_of_messages_is_what_both_begin_with() -> None:
    chosen, rejected = [SYSTEM, ASK, YES, ASK, YES], [SYSTEM, ASK, YES, ASK, NO]
    expected = [(tuple(chosen), (4,)), (tuple(rejected), (4,))]
    assert _turns(_pair({"chosen": chosen, "rejected": rejected})) == expected
    assert _turns(_pair({"prompt": "q", "chosen": chosen, "rejected": rejected})) == expected  # it is in them


def test_pairs_of_alpaca_and_sharegpt() -> None:
    expected = [((SYSTEM, ASK, YES), (2,)), ((SYSTEM, ASK, NO), (2,))]
    alpaca = {"instruction": "q", "system": "s", "chosen": "y", "rejected": "n"}
    assert _turns(_pair(alpaca)) == expected
    text = _pair(alpaca, DataConfig(Path("t"), instruction_format="alpaca"))
    assert text.rejected == Completion("s\n\n### Instruction:\nq\n\n### Response:\n", "n")
    turns = {"conversations": [{"from": "human", "value": "q"}], "system": "s"}
    for chosen, rejected in (
        ({"from": "gpt", "value": "y"}, {"from": "gpt", "value": "n"}),
        ([YES], [NO]),
        ("y", "n"),
    ):
        assert _turns(_pair({**turns, "chosen": chosen, "rejected": rejected})) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"prompt": "p", "chosen": "a"}, "needs both chosen and rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be a string or a list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [NO]}, "must be both strings, or both lists of messages"),
        (
            {"prompt": "p", "chosen": [YES], "rejected": [NO]},
            "prompt is a string, and chosen and rejected are",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{}]}, "tools belong to messages"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score": 1},
            r"score is not a key .* \(prompt, chosen",
        ),
        ({"prompt": [ASK], "chosen": "a", "rejected": "b", "system": "s"}, "system is not a key that training reads"),
        ({"chosen": "a b", "rejected": "a c", "input": "s"}, "input is not a key that training reads"),
        (
            {"prompt": "p", "instruction": "q", "chosen": "a", "rejected": "b"},
            "one of prompt and instruction, not",
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES, ASK, NO]}, "one of chosen and rejected begins with all of the"),
        ({"chosen": [SYSTEM, YES], "rejected": [ASK, NO]}, r"part at chosen\[0\], which is not the assistant's"),
        ({"chosen": [ASK, YES], "rejected": [ASK, ASK, NO]}, r"part at rejected\[1\], which is not the assistant's"),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [{**NO, "weight": 0}]}, "no turn of the assistant is trained"),
        (
            {"prompt": [ASK], "chosen": [YES, ASK], "rejected": [NO]},
            "the last message of chosen must be the",
        ),
    ],
)
def test_what_is_no_pair_is_refused(value: Any, says: str) -> None:
    with pytest.raises(RecordInvalid, match=says):
        parse_record(value)

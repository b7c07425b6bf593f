"""What does not fit its field is refused by the field's name, all of it at once; what fits arrives as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from loramux import convert, fields
from loramux.errors import InvalidArgument
from loramux.types import GenerateOptions
from loramux_server.api.convert import read_generate
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.validate import check_generate
from loramux_server.errors import InvalidRequest
from support.raw_requests import raw_request


def _refused(**options: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        convert.generate_request("x", None, None, "", options)  # type: ignore[arg-type]
    assert caught.value.reason == "INVALID_REQUEST"
    return {v.field: v.description for v in caught.value.violations}


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("top_k", -1, "-1 is out of range; 0 or unset means off"),
        ("seed", -1, "-1 is out of range; unset means that the server draws one"),
        ("max_tokens", -1, "-1 is out of range; unset means what the context leaves"),
        ("min_tokens", 1 << 32, "4294967296 is out of range; 0 or unset means off"),
        ("logprobs", -1, "-1 is out of range; unset means none"),
        ("priority", 1 << 31, "2147483648 is out of range; lower runs first"),
        ("n", 1.5, "1.5 is not a whole number; unset means 1"),
        ("max_tokens", "16", "'16' is not a whole number; unset means what the context leaves"),
        ("top_k", True, "True is not a whole number; 0 or unset means off"),
        ("temperature", "0.5", "'0.5' is not a number"),
        ("temperature", -3, "-3 is out of range: must be from 0 to 100; 0 is greedy"),
        ("top_p", 0.0, "0 is out of range: must be over 0 and at most 1; 1 or unset means off"),
        ("max_tokens", 0, "0 is out of range; unset means what the context leaves"),
        ("n", 0, "0 is out of range; unset means 1"),
        ("cache_salt", "x" * 257, "257 characters, and 256 are allowed"),
        ("stop_token_ids", [1] * 1025, "1025 ids, and 1024 are allowed"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "1025 entries, and 1024 are allowed"),
        ("top_p", [0.5], "[0.5] is not a number"),
        ("ignore_eos", 1, "1 is neither True nor False"),
        ("request_id", 7, "7 is not a string"),
        ("cache_salt", "\ud800", "holds half a character at position 0, which UTF-8 cannot spell"),
        ("stop", 5, "5 is not a string or a list of strings"),
        ("logit_bias", [3], "[3] is not a mapping of token ids to numbers"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(option: str, value: object, why: str) -> None:
    assert _refused(**{option: value}) == {option: why}


def test_a_part_of_a_list_is_refused_by_its_place() -> None:
    wrong = {"stop": ["a", 5], "stop_token_ids": [1, -1], "logit_bias": {3: "x"}}
    assert list(_refused(**wrong)) == ["stop[1]", "stop_token_ids[1]", "logit_bias[3]"]
    wrong = {"stop": ["a", ""], "logit_bias": {3: 100.5}}
    assert _refused(**wrong) == {
        "stop[1]": "must not be empty", "logit_bias[3]": "100.5 is out of range: must be from -100 to 100",
    }  # fmt: skip
    with pytest.raises(InvalidArgument) as caught:
        convert.generate_request(None, [1, 2.5], None, "", {})  # type: ignore[list-item]
    assert caught.value.violations[0].field == "token_ids[1]"
    with pytest.raises(InvalidArgument, match=r"token_ids\[0\]: '1' is not a whole number"):
        convert.detokenize_request(["1"])  # type: ignore[list-item]


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.generate_request(None, None, [{"role": "user"}], 3, {"top_k": -1, "seed": 0.5})  # type: ignore[arg-type]
    assert [v.field for v in caught.value.violations] == ["adapter", "messages[0].content", "top_k", "seed"]
    assert "top_k: -1 is out of range; 0 or unset means off" in str(caught.value)


def test_everything_that_every_server_refuses_is_told_at_once() -> None:
    wrong = {
        "temperature": -3, "top_p": 5, "top_k": -1, "min_p": math.nan, "repetition_penalty": 0, "presence_penalty": 3,
        "frequency_penalty": -math.inf, "seed": -1, "n": 0, "max_tokens": 16, "min_tokens": 17, "stop": [""],
        "logit_bias": {1: 200},
    }  # fmt: skip
    told = _refused(**wrong)
    assert set(told) == set(wrong) - {"max_tokens", "stop", "logit_bias"} | {"stop[0]", "logit_bias[1]"}
    assert told["min_tokens"] == "17 is out of range: must be from 0 to 16, which is max_tokens"


EDGES = (0.0, 0.01, 1.0, 2.0, 10.0, 100.0, 256.0, 1024.0)
NUMBERS = sorted({
    sign * near
    for edge in EDGES
    for near in (edge, edge + 1e-12, edge - 1e-12, edge + 1e-3, edge - 1e-3)
    for sign in (1, -1)
} | {1e-50, 1e30, 1e300})  # fmt: skip
LIMITS = ServerLimits(4096, 64, 8, 16, 1 << 20, 64, 1 << 20, 1 << 20, 4096, 4096, 4096, 4096)


def _is_refused_here(options: dict[str, Any]) -> bool:
    try:
        convert.generate_request("x", None, None, "", options)  # type: ignore[arg-type]
    except InvalidArgument:
        return True
    return False


def _is_refused_there(options: dict[str, Any]) -> bool:
    try:
        check_generate(read_generate(raw_request("x", options)), LIMITS)
    except InvalidRequest:
        return True
    return False


@pytest.mark.parametrize(
    ("option", "values"),
    [
        *((name, NUMBERS) for name in sorted(fields.REAL)),
        *((name, [0, 1, 2, 4096]) for name in sorted(set(fields.WHOLE) - {"priority"})),
        ("logit_bias", [*({3: number} for number in NUMBERS), *(dict.fromkeys(range(n), 1.0) for n in (1024, 1025))]),
        ("stop", [[""], ["x" * 256], ["x" * 257]]),
        ("stop_token_ids", [[1] * 1024, [1] * 1025]),
        ("cache_salt", ["x" * 256, "x" * 257]),
    ],
)
def test_what_is_refused_here_is_what_a_server_refuses(option: str, values: list[Any]) -> None:
    """A server whose own limits are out of the way."""
    known = fields.REAL.keys() | fields.WHOLE.keys() | fields.YES_OR_NO | fields.TEXTS
    assert set(GenerateOptions.__annotations__) == known | {"stop", "stop_token_ids", "logit_bias", "tools"}
    here = [value for value in values if _is_refused_here({option: value})]
    there = [value for value in values if _is_refused_there({option: value})]
    assert here == there
    assert len(there) < len(values)


ADAPTERS: list[Mapping[str, float]] = [
    {"a": 1.0}, {"a": 0.0}, {"a": 100.0, "b@12345678": -100.0}, {"a": 101.0}, {"": 1.0}, {"a": math.nan},
    {"a": 1e-7}, {"a": -1e-6},
    dict.fromkeys(map(str, range(16)), 1.0), dict.fromkeys(map(str, range(17)), 1.0),
]  # fmt: skip


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_several_adapters_are_refused_here_where_a_server_refuses_them(adapters: Mapping[str, float]) -> None:
    raw = raw_request("x", {})
    for name, weight in adapters.items():
        raw.adapters.add(adapter=name, weight=weight)
    try:
        check_generate(read_generate(raw), LIMITS)
    except InvalidRequest:
        with pytest.raises(InvalidArgument, match="adapter"):
            convert.generate_request("x", None, None, adapters, {})
    else:
        sent = convert.generate_request("x", None, None, adapters, {})
        assert sent.adapters == raw.adapters
        assert not sent.adapter


def test_no_adapters_at_all_are_not_the_base() -> None:
    with pytest.raises(InvalidArgument, match="must not be empty; leave it out to ask the base"):
        convert.generate_request("x", None, None, {}, {})


def test_numbers_of_other_types_fit() -> None:
    class Index:
        def __index__(self) -> int:
            return 7

    request = convert.generate_request("x", None, None, "", {"top_k": Index(), "temperature": 1})  # type: ignore[typeddict-item]
    assert (request.sampling.top_k, request.sampling.temperature) == (7, 1.0)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "ü"]}}}
RICH: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 3?", "name": "eve"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
    {"role": "assistant", "content": "5", "reasoning_content": "easy"},
    {"role": "user", "content": [{"type": "text", "text": "thanks"}]},
    {"role": "user", "content": "plain"},
]


def test_every_key_of_a_message_travels() -> None:
    request = convert.generate_request(None, None, RICH, "", {"tools": [CALL]})
    sent = [json.loads(m.json) if m.json else {"role": m.role, "content": m.content} for m in request.chat.messages]
    assert sent == RICH
    assert list(sent[1]) == list(RICH[1])  # in their order: templates may go through them
    assert not request.chat.messages[5].json
    assert json.loads(request.chat.tools_json) == [CALL]


def test_what_no_json_holds_is_refused_by_message_and_key() -> None:
    messages = [RICH[0], {"role": "assistant", "content": "x", "when": object(), "score": float("nan")}]
    with pytest.raises(InvalidArgument) as caught:
        convert.generate_request(None, None, messages, "", {"tools": [{"f": {1, 2}}]})
    assert [v.field for v in caught.value.violations] == ["messages[1].when", "messages[1].score", "tools"]
    with pytest.raises(InvalidArgument, match="tools: go with messages"):
        convert.generate_request("x", None, None, "", {"tools": [CALL]})

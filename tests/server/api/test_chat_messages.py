"""Every key of a message reaches the chat template, as the trainer hands it over; tools too, where it takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from loramux import convert
from loramux_protos.v1 import inference_pb2
from loramux_server.text.chat_faults import ChatRefused
from loramux_server.text.tokenizer import TextTokenizer
from support.servers import FakeTokenizer, Inside, details, served
from support.tokenizers import write_byte_level

CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, "ü"]}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 3?", "name": "eve"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "content": "5", "reasoning_content": "easy"},
]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "[{{ m.role }} {{ m.keys() | list | join(',') }} {{ m.content }} {% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.arguments.b[0] }}{{ c | tojson }}{% endfor %}{% endif %}{{ m.reasoning_content }}]{% endfor %}"
)


class Recorder(FakeTokenizer):
    """Keeps what it was given."""

    takes_tools = True

    def __init__(self) -> None:
        self.given: list[tuple[list[Any], list[Any]]] = []

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), most: int | None = None
    ) -> list[int]:
        self.given.append((list(messages), list(tools)))
        return [1, 2]


@pytest.mark.asyncio
async def test_messages_arrive_as_they_were_written(tmp_path: Path) -> None:
    tokenizer = Recorder()
    async with served(tmp_path, Inside(tokenizer=tokenizer)) as server:
        request = convert.generate_request(None, None, MESSAGES, "", {"tools": [CALL], "max_tokens": 2})
        await server.inference.Generate(request)
        await server.inference.Tokenize(convert.tokenize_request(None, MESSAGES, [CALL]))
    assert tokenizer.given == [(MESSAGES, [CALL])] * 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("message", "tools", "field"),
    [
        ({"json": "{"}, "", "chat.messages[0].json"),
        ({"json": "[]"}, "", "chat.messages[0].json"),
        ({"json": '{"role": "user", "x": NaN}'}, "", "chat.messages[0].json"),
        ({"json": '{"role": "user", "content": "x"}', "role": "user"}, "", "chat.messages[0].json"),
        ({"json": "[" * 100_000}, "", "chat.messages[0].json"),
        ({"json": '{"content": "x"}'}, "", "chat.messages[0].role"),
        ({"json": '{"role": 7}'}, "", "chat.messages[0].role"),
        ({"role": "user", "content": "x"}, "{}", "chat.tools_json"),
        ({"role": "user", "content": "x"}, "[1]", "chat.tools_json"),
        ({"role": "user", "content": "x"}, "[{}]", "chat.tools_json"),  # FakeTokenizer takes none
    ],
)
async def test_what_is_no_message_is_refused_by_field(
    tmp_path: Path, message: dict[str, str], tools: str, field: str
) -> None:
    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(**message)
    request.chat.tools_json = tools
    async with served(tmp_path) as server:
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(request)
    assert details(caught.value)["BadRequest"].field_violations[0].field == field


def test_the_template_renders_them_as_in_training(tmp_path: Path) -> None:
    served_by = TextTokenizer.load(write_byte_level(tmp_path, chat_template=TEMPLATE))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    wanted = tokenizer.apply_chat_template(MESSAGES, tools=[CALL], tokenize=False, add_generation_prompt=True)
    sent = convert.tokenize_request(None, MESSAGES, [CALL]).chat
    received = [json.loads(m.json) for m in sent.messages]
    assert served_by.takes_tools
    assert served_by.render_chat(received, json.loads(sent.tools_json)) == wanted
    for part in ("role,content,name", "2.5", '"arguments": {"a": 1', "easy"):
        assert part in wanted


class TextOnly(FakeTokenizer):
    """Fails as templates do that add strings."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), most: int | None = None
    ) -> list[int]:
        raise ChatRefused("the chat template refused: it fails on a list here, and takes text", "[1].content")


@pytest.mark.asyncio
async def test_a_message_that_the_template_fails_on_is_the_field_that_is_refused(tmp_path: Path) -> None:
    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(role="user", content="x")
    async with served(tmp_path, Inside(tokenizer=TextOnly())) as server:
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(request)
    [violation] = details(caught.value)["BadRequest"].field_violations
    assert violation.field == "chat.messages[1].content"
    assert violation.description == "the chat template refused: it fails on a list here, and takes text"


def test_a_template_without_tools_takes_none(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert not TextTokenizer.load(write_byte_level(tmp_path, chat_template=template)).takes_tools


def test_what_is_nested_is_measured_too(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_byte_level(tmp_path, chat_template=TEMPLATE))
    big = {"role": "user", "content": None, "tool_calls": [{"function": {"x": "y" * (5 << 20)}}]}
    with pytest.raises(ChatRefused, match="at most"):
        tokenizer.encode_chat([big])


def test_what_is_nested_deeply_is_refused_not_a_crash(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_byte_level(tmp_path, chat_template="{{ messages | tojson }}"))
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ChatRefused, match="the chat template refused"):
        tokenizer.encode_chat([{"role": "user", "content": None, "tool_calls": deep}])

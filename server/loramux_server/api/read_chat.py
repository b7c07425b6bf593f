"""A conversation as it came over the wire to neutral turns: plain messages, whole ones in JSON, and tools.

Refuses what is not the JSON it must be; whether roles and sizes are acceptable is `validate`'s matter.
"""

from __future__ import annotations

import json
from typing import Any

from loramux_protos.v1 import common_pb2, inference_pb2
from loramux_server.api.calls import ChatTurn, Tools
from loramux_server.errors import InvalidRequest


def read_chat(field: str, chat: inference_pb2.Chat) -> tuple[ChatTurn, ...]:
    """The messages of a conversation. Raises InvalidRequest."""
    return tuple(_read_turn(f"{field}[{index}]", message) for index, message in enumerate(chat.messages))


def read_tools(field: str, chat: inference_pb2.Chat) -> Tools:
    """The tools of a conversation. Raises InvalidRequest."""
    if not chat.tools_json:
        return ()
    tools = _parse(field, chat.tools_json)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest(field, "must be a JSON array of objects")
    return tuple(tools)


def _read_turn(field: str, message: common_pb2.ChatMessage) -> ChatTurn:
    if not message.json:
        return ChatTurn(message.role, message.content)
    if message.role or message.content:
        raise InvalidRequest(f"{field}.json", "stands for the whole message: leave role and content empty beside it")
    whole = _parse(f"{field}.json", message.json)
    if not isinstance(whole, dict):
        raise InvalidRequest(f"{field}.json", "must be a JSON object")
    role, content = whole.get("role"), whole.get("content")
    return ChatTurn(
        role if isinstance(role, str) else "",
        content if isinstance(content, str) else "",
        whole,
        len(message.json),
    )


def _parse(field: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

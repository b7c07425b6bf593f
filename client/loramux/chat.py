"""Conversations as Python values into Chat messages: a plain message as its two fields, any other one whole, as JSON.

What a message holds reaches the chat template as it is, or the message is refused: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loramux.fields import Refusals, json_text
from loramux_protos.v1 import common_pb2, inference_pb2

_PLAIN = {"role", "content"}


def fill_chat(
    chat: inference_pb2.Chat,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    refusals: Refusals,
) -> None:
    """Fill `chat`; what does not fit goes to `refusals` by `messages[i]` and key."""
    if isinstance(messages, str | bytes | Mapping):
        refusals.add("messages", "must be a list of mappings with role and content")
        return
    for index, message in enumerate(messages):
        _fill_message(chat.messages.add(), f"messages[{index}]", message, refusals)
    if tools:
        chat.tools_json = refusals.take("tools", list(tools), json_text) or ""


def _fill_message(filled: common_pb2.ChatMessage, field: str, message: object, refusals: Refusals) -> None:
    if not isinstance(message, Mapping):
        refusals.add(field, "must be a mapping with role and content")
        return
    if not isinstance(message.get("role"), str):
        refusals.add(f"{field}.role", f"{message['role']!r} is not a string" if "role" in message else "is missing")
        return
    if "content" not in message and set(message) <= _PLAIN:
        refusals.add(f"{field}.content", "is missing")
        return
    if None in [refusals.take(f"{field}.{key}", value, json_text) for key, value in message.items()]:
        return
    if set(message) == _PLAIN and isinstance(message["content"], str):
        filled.role, filled.content = message["role"], message["content"]
    else:
        filled.json = json_text(dict(message))

"""Messages, tools and single values of a record: their form, which turns are trained, and no key unread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux_trainer.data.record_types import Conversation, RecordInvalid

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_LOSS_KEYS = ("weight", "train")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING_KEYS, *_LOSS_KEYS)


def conversation(
    parts: Mapping[str, Any], tools: Any, *, context: int | None = None, judged: bool = False
) -> Conversation:
    """One conversation of its `parts`, lists of messages by their key in the record.

    The first `context` messages are a prompt: by default all parts but the last. Of the others all turns of the
    assistant are trained, or with `judged` the last message alone, and no message may have a weight. Raises
    RecordInvalid.
    """
    named = []
    for key, messages in parts.items():
        if not isinstance(messages, list) or not messages:
            raise RecordInvalid(f"{key} must be a non-empty list")
        named += [(f"{key}[{index}]", message) for index, message in enumerate(messages)]
    for where, message in named:
        check_message(where, message)
    last = list(parts)[-1]
    if named[-1][1]["role"] != "assistant":
        raise RecordInvalid(f"the last message{_of(last)} must be the assistant's: there is nothing to learn")
    if judged:
        _refuse_weights(named)
        trained: tuple[int, ...] = (len(named) - 1,)
    else:
        trained = _find_trained(named, len(named) - len(parts[last]) if context is None else context)
    messages = tuple({key: value for key, value in m.items() if key not in _LOSS_KEYS} for _, m in named)
    return Conversation(messages, trained, check_tools(tools))


def check_tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    """None where there are none. Raises RecordInvalid."""
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordInvalid("tools must be a list of objects, each the JSON schema of a function")
    return tuple(tools)


def refuse_unread(value: Mapping[str, Any], known: Sequence[str], where: str = "", remedy: str = "") -> None:
    """A key with a value must not be ignored: the run would not be what its data asks for."""
    for key, content in value.items():
        if key not in known and not (content is None or content is False or content in ("", [], {})):
            raise RecordInvalid(
                f"{where}{key} is not a key that training reads ({', '.join(known)}): remove it, or set it to null"
                f"{remedy.format(key=key)}"
            )


def refuse_half_characters(where: str, value: Any) -> None:
    """JSON can contain half of a surrogate pair, which no tokenizer accepts."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            refuse_half_characters(f"{where}: the key {key!a}" if where else f"the key {key!a}", key)
            refuse_half_characters(f"{where}.{key}" if where else key, content)
    elif isinstance(value, list):
        for index, content in enumerate(value):
            refuse_half_characters(f"{where}[{index}]", content)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordInvalid(
                f"{where} has half a character at position {error.start}: \\u{ord(value[error.start]):04x} without "
                "the other half of its pair"
            ) from error


def check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RecordInvalid(f"{where} needs a role and a content string")
    if message["role"] not in ROLES:
        raise RecordInvalid(f"{where}.role must be one of {', '.join(ROLES)}, not {message['role']!r}")
    if not isinstance(message.get("content"), str) and not (
        message.get("content") is None and message["role"] == "assistant" and message.get("tool_calls")
    ):
        raise RecordInvalid(f"{where} needs a role and a content string")
    refuse_unread(message, _MESSAGE_KEYS, f"{where}.")


def _find_trained(named: Sequence[tuple[str, Mapping[str, Any]]], context: int) -> tuple[int, ...]:
    """Indices of the trained turns; the first `context` messages are a prompt."""
    trained = []
    for index, (where, message) in enumerate(named):
        wanted = _is_trained(where, message)
        if index >= context:
            trained += [index] * wanted
        elif any(message.get(key) for key in _LOSS_KEYS):
            raise RecordInvalid(f"{where} is of the prompt, which carries no loss: remove its weight")
    if not trained:
        raise RecordInvalid("no turn of the assistant is trained: weight is 0, or train false, on all of them")
    return tuple(trained)


def _refuse_weights(named: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    for where, message in named:
        if any(message.get(key) is not None for key in _LOSS_KEYS):
            raise RecordInvalid(f"{where} has a weight, and label judges the last message alone: remove the weight")


def _is_trained(where: str, message: Mapping[str, Any]) -> bool:
    said = {key: message[key] for key in _LOSS_KEYS if message.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise RecordInvalid(f"{where}.{key} must be {allowed}, not {value!r}")
    if len(set(map(bool, said.values()))) > 1:
        raise RecordInvalid(f"{where}.weight and {where}.train contradict each other")
    if message["role"] != "assistant":
        if any(said.values()):
            raise RecordInvalid(f"{where} is the {message['role']}'s: only the assistant's turns can be trained")
        return False
    return all(said.values())


def _of(key: str) -> str:
    return "" if key == "messages" else f" of {key}"

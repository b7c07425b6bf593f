"""Records of Alpaca and ShareGPT as the records they stand for: prompts and completions, or messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from loramux_trainer.data.record_messages import refuse_unread
from loramux_trainer.data.record_types import RecordInvalid

INSTRUCTION_KEYS: Final = ("instruction", "input", "system")

_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
_WITHOUT: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL: Final = "function_call"


def instruction_prompt(value: Mapping[str, Any], form: Literal["chat", "alpaca"]) -> str | list[dict[str, str]]:
    """The prompt of an Alpaca record: Stanford's text, or messages. Raises RecordInvalid."""
    instruction, given, system = ("" if value.get(key) is None else value[key] for key in INSTRUCTION_KEYS)
    if not all(isinstance(text, str) for text in (instruction, given, system)):
        raise RecordInvalid(f"{', '.join(INSTRUCTION_KEYS)} must be strings")
    if not instruction:
        raise RecordInvalid("instruction is empty: an Alpaca record needs instruction and output")
    if form == "alpaca":
        asked = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        return f"{system or (_WITH_INPUT if given else _WITHOUT)}\n\n{asked}### Response:\n"
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": f"{instruction}\n{given}" if given else instruction}]


def as_messages(where: str, turns: Any, system: Any = None) -> Any:
    """Turns of ShareGPT (from, value) or messages, one or a list, as messages; other things as they are.

    Raises RecordInvalid.
    """
    if isinstance(turns, Mapping):
        turns = [turns]
    if not isinstance(turns, list):
        return turns
    messages = [_as_message(f"{where}[{index}]", turn) for index, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _as_message(where: str, turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role, value = turn["from"], turn.get("value")
    others = {key: content for key, content in turn.items() if key not in ("from", "value")}
    if role == _CALL:
        return {"role": "assistant", "content": None, "tool_calls": _calls(where, value), **others}
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordInvalid(f"{where}.from must be one of {', '.join((*_ROLES, _CALL))}, not {role!r}")
    return {"role": _ROLES[role], "content": value, **others}


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    """The calls of a turn of functions, which holds them as JSON."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError) as error:
        raise RecordInvalid(f"{where}.value must be the JSON of a call: name and arguments") from error
    listed = calls if isinstance(calls, list) else [calls]
    if not listed or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in listed):
        raise RecordInvalid(f"{where}.value must be the JSON of a call: name and arguments")
    for call in listed:
        refuse_unread(call, ("name", "arguments"), f"{where}.value: ")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in listed
    ]

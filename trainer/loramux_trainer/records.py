"""JSON Lines into records whose form is right: what is trained, what only stands before it, and no key unread.

Knows no tokenizer, so that a file is checked in a moment.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_trainer.errors import DataInvalid, Problems
from loramux_trainer.foreign_formats import name_file_format, name_line_format, name_record_format

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_RECORD_KEYS = ("prompt", "completion", "messages", "tools")
_LOSS_KEYS = ("weight", "train")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING_KEYS, *_LOSS_KEYS)


class RecordInvalid(ValueError):
    """What is wrong with one record; the reader adds file and line."""


@dataclass(frozen=True)
class Completion:
    """A text and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True, eq=False)
class Conversation:
    """Messages as a chat template takes them; `trained` are the indices of the turns that carry the loss."""

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[int, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


Record = Completion | Conversation


def read_records(path: Path, problems: Problems | None = None) -> Iterator[tuple[int, Record]]:
    """(line number, record) of each line that is not blank. Raises DataInvalid with file and line.

    What is wrong with single lines goes to `problems` where they are given, and reading continues after it.
    """
    seen = False
    try:
        with path.open("rb") as file:
            if (form := name_file_format(path, file.read(8))) is not None:
                raise DataInvalid(path, 0, form)
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if not seen and (form := name_line_format(path, line)) is not None:
                    raise DataInvalid(path, number, form)
                seen = True
                try:
                    record = _located(path, number, line)
                except DataInvalid as error:
                    if problems is None:
                        raise
                    problems.add(error)
                    continue
                yield number, record
    except OSError as error:
        raise DataInvalid(path, 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataInvalid(path, 0, f"not UTF-8 at byte {error.start}") from error
    if not seen:
        raise DataInvalid(path, 0, "has no record")


def parse_record(value: Any) -> Record:
    """A record of {"prompt", "completion"} or {"messages", "tools"}. Raises RecordInvalid."""
    if not isinstance(value, Mapping):
        raise RecordInvalid("a record must be a JSON object")
    if (form := name_record_format(value)) is not None:
        raise RecordInvalid(form)
    _refuse_unread(value, _RECORD_KEYS, "")
    _refuse_half_characters("", value)
    has_text = any(value.get(key) is not None for key in ("prompt", "completion"))
    if value.get("messages") is not None:
        if has_text:
            raise RecordInvalid("give either messages, or prompt and completion, not both")
        messages = value["messages"]
        return Conversation(_check_messages(messages), _find_trained(messages), _check_tools(value.get("tools")))
    if value.get("tools"):
        raise RecordInvalid("tools belong to messages: a prompt must contain them as text")
    if value.get("prompt") is None or value.get("completion") is None:
        raise RecordInvalid("a record needs either messages, or prompt and completion")
    return _check_completion(value["prompt"], value["completion"])


def _located(path: Path, number: int, line: str) -> Record:
    try:
        return parse_record(json.loads(line, object_pairs_hook=_unique))
    except json.JSONDecodeError as error:
        raise DataInvalid(path, number, f"not JSON: {error.msg} at column {error.colno}") from error
    except RecordInvalid as error:
        raise DataInvalid(path, number, str(error)) from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python reads
        raise DataInvalid(path, number, f"not JSON that can be read: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordInvalid(f"the key {twice!r} is given twice in one object")
    return result


def _refuse_unread(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """A key with a value must not be ignored: the run would not be what its data asks for."""
    for key, content in value.items():
        if key not in known and not (content is None or content is False or content in ("", [], {})):
            raise RecordInvalid(
                f"{where}{key} is not a key that training reads ({', '.join(known)}): remove it, or set it to null"
            )


def _check_completion(prompt: Any, completion: Any) -> Completion:
    if isinstance(prompt, list) and isinstance(completion, list):
        raise RecordInvalid(
            "prompt and completion contain messages: join them into one list under messages, with train: false on the "
            "assistant's turns of the prompt"
        )
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RecordInvalid("prompt and completion must be strings")
    if not completion:
        raise RecordInvalid("completion is empty: there is nothing to learn")
    return Completion(prompt, completion)


def _check_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise RecordInvalid("messages must be a non-empty list")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise RecordInvalid(f"{where} needs a role and a content string")
        if message["role"] not in ROLES:
            raise RecordInvalid(f"{where}.role must be one of {', '.join(ROLES)}, not {message['role']!r}")
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and message["role"] == "assistant" and message.get("tool_calls")
        ):
            raise RecordInvalid(f"{where} needs a role and a content string")
        _refuse_unread(message, _MESSAGE_KEYS, f"{where}.")
    if messages[-1]["role"] != "assistant":
        raise RecordInvalid("the last message must be the assistant's: there is nothing to learn")
    return tuple({key: value for key, value in m.items() if key not in _LOSS_KEYS} for m in messages)


def _find_trained(messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    trained = [index for index, message in enumerate(messages) if _is_trained(f"messages[{index}]", message)]
    if not trained:
        raise RecordInvalid("no turn of the assistant is trained: weight is 0, or train false, on all of them")
    return tuple(trained)


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


def _check_tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordInvalid("tools must be a list of objects, each the JSON schema of a function")
    return tuple(tools)


def _refuse_half_characters(where: str, value: Any) -> None:
    """JSON can contain half of a surrogate pair, which no tokenizer accepts."""
    if isinstance(value, Mapping):
        for key, content in value.items():
            _refuse_half_characters(f"{where}.{key}" if where else key, content)
    elif isinstance(value, list):
        for index, content in enumerate(value):
            _refuse_half_characters(f"{where}[{index}]", content)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordInvalid(
                f"{where} has half a character at position {error.start}: \\u{ord(value[error.start]):04x} without "
                "the other half of its pair"
            ) from error

"""Values of a data file into records whose form is right: what is trained, what only stands before it, no key unread.

Knows no tokenizer, so that a file is checked in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_trainer.data.examples import IGNORE
from loramux_trainer.data.files import read_values
from loramux_trainer.data.loss_records import explain_unread, reads
from loramux_trainer.data.preferences import PAIR_KEYS, parse_pair
from loramux_trainer.data.record_formats import INSTRUCTION_KEYS, as_messages, instruction_prompt
from loramux_trainer.data.record_messages import conversation, refuse_half_characters, refuse_unread
from loramux_trainer.data.record_types import Answer, Completion, Judged, Record, RecordInvalid, Tokens
from loramux_trainer.errors import DataInvalid, Problems
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import SFT, LossConfig

_MASKS: Final = ("completion_mask", "assistant_masks")
# Keys whose values may be JSON in a text: of a table, or as trl has tools.
_NESTED: Final = ("messages", "conversations", "tools", "input_ids", "labels", "attention_mask", *_MASKS)
_OR_IGNORE: Final = ", or name it in data.ignore_columns"


@dataclass(frozen=True)
class _Format:
    """Recognized by its first key; `keys` are those that are read."""

    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], DataConfig | None], Record]


def read_records(
    path: Path, problems: Problems | None = None, data: DataConfig | None = None, loss: LossConfig = SFT
) -> Iterator[tuple[int, Record]]:
    """(line number, record) of each value that `loss` reads. Raises DataInvalid with file and line.

    What is wrong with single records goes to `problems` where they are given, and reading continues after it; a file
    that begins with another kind of record than the loss reads is refused at once.
    """
    unseen = dict(data.columns) if data else {}
    right = False
    for number, value in read_values(path, problems):
        if isinstance(value, Mapping):
            unseen = {ours: theirs for ours, theirs in unseen.items() if theirs not in value}
        try:
            record = parse_record(value, data)
            if not reads(loss, record):
                reason = explain_unread(loss, record)
                if not right:
                    raise DataInvalid(path, number, reason)
                raise RecordInvalid(reason)
        except RecordInvalid as error:
            located = DataInvalid(path, number, str(error))
            if problems is None:
                raise located from error
            problems.add(located)
            continue
        right = True
        yield number, record
    for ours, theirs in unseen.items():
        raise DataInvalid(path, 0, f"no record has {theirs}, which data.columns reads as {ours}")


def parse_record(value: Any, data: DataConfig | None = None) -> Record:
    """A record of any format that is read. Raises RecordInvalid."""
    if not isinstance(value, Mapping):
        raise RecordInvalid("a record must be a JSON object")
    value = _nested(renamed(value, data))
    refuse_half_characters("", value)
    form = next((form for key, form in _FORMATS.items() if value.get(key) is not None), _COMPLETION)
    if form is _TEXT and any(value.get(key) is not None for key in ("prompt", "completion")):
        form = _COMPLETION
    refuse_unread(value, form.keys, remedy=_OR_IGNORE)
    if value.get("label") is False and "label" not in form.keys:  # not empty: it says that the answer is bad
        raise RecordInvalid(f"label is not a key that training reads beside {form.keys[0]}: leave this record out")
    return form.parse(value, data)


def renamed(value: Mapping[str, Any], data: DataConfig | None) -> Mapping[str, Any]:
    """A record's values with the keys that `data.columns` gives, and without those of `data.ignore_columns`."""
    if data is None or not (data.columns or data.ignore_columns):
        return value
    names = {theirs: ours for ours, theirs in data.columns.items()}
    kept: dict[str, Any] = {}
    for key, content in value.items():
        if key in data.ignore_columns:
            continue
        name = names.get(key, key)
        if name in kept:
            raise RecordInvalid(
                f"{name} is there, and data.columns reads {data.columns[name]} as it: name one of them in "
                "data.ignore_columns"
            )
        kept[name] = content
    return kept


def _nested(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what is written as JSON opened; an empty cell of a table is none."""
    texts = {key: value[key].strip() for key in _NESTED if isinstance(value.get(key), str)}
    if not texts:
        return value
    opened = {key: content for key, content in value.items() if texts.get(key) != ""}
    for key in (key for key, text in texts.items() if text[:1] in ("[", "{")):
        try:
            opened[key] = json.loads(value[key])
        except (ValueError, RecursionError) as error:
            raise RecordInvalid(f"{key} is not JSON that can be read: {error}") from error
    return opened


def _parse_messages(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    if any(value.get(key) for key in ("prompt", "completion")):
        raise RecordInvalid("give either messages, or prompt and completion, not both")
    return _judged(
        value, lambda judged: conversation({"messages": value["messages"]}, value.get("tools"), judged=judged)
    )


def _parse_sharegpt(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    turns = as_messages("conversations", value["conversations"], value.get("system"))
    return _judged(value, lambda judged: conversation({"conversations": turns}, value.get("tools"), judged=judged))


def _parse_instruction(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    prompt, output = instruction_prompt(value, data.instruction_format if data else "chat"), value.get("output")
    if not isinstance(output, str) or not output:
        raise RecordInvalid("output is empty or no string: an Alpaca record needs instruction and output")
    if isinstance(prompt, str):
        return _judged(value, lambda _: Completion(prompt, output))
    answer = [{"role": "assistant", "content": output}]
    return _judged(value, lambda judged: conversation({"instruction": prompt, "output": answer}, None, judged=judged))


def _parse_text(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    if not isinstance(value["text"], str) or not value["text"]:
        raise RecordInvalid("text is empty or no string: there is nothing to learn")
    text = value["text"]
    return _judged(value, lambda _: Completion("", text))


def _parse_completion(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    prompt, completion = (as_messages(key, value.get(key)) for key in ("prompt", "completion"))
    tools = value.get("tools")
    if isinstance(prompt, list) and isinstance(completion, list):
        parts = {"prompt": prompt, "completion": completion}
        return _judged(value, lambda judged: conversation(parts, tools, judged=judged))
    if tools:
        raise RecordInvalid("tools belong to messages: a prompt must contain them as text")
    if prompt is None or completion is None:
        raise RecordInvalid("a record needs either messages, or prompt and completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RecordInvalid("prompt and completion must be strings, or both lists of messages")
    if not completion:
        raise RecordInvalid("completion is empty: there is nothing to learn")
    return _judged(value, lambda _: Completion(prompt, completion))


def _parse_tokens(value: Mapping[str, Any], data: DataConfig | None) -> Record:
    ids = _whole_numbers(value, "input_ids", None)
    if not ids or min(ids) < 0:
        raise RecordInvalid("input_ids must be a list of ids, none of them negative")
    if value.get("attention_mask") is not None and set(_whole_numbers(value, "attention_mask", len(ids))) != {1}:
        raise RecordInvalid("attention_mask has zeros: leave the padding out of input_ids")
    masks = [key for key in _MASKS if value.get(key) is not None]
    if value.get("labels") is not None:
        if masks:
            raise RecordInvalid(f"give either labels or {masks[0]}, not both")
        labels = _whole_numbers(value, "labels", len(ids))
        wrong = next(
            (i for i, (token, label) in enumerate(zip(ids, labels, strict=True)) if label not in (token, IGNORE)), None
        )
        if wrong is not None:
            raise RecordInvalid(
                f"labels[{wrong}] is {labels[wrong]}: it must be input_ids[{wrong}], or {IGNORE} for no loss"
            )
        return Tokens(ids, labels)
    flags = [_whole_numbers(value, key, len(ids)) for key in masks]
    for key, given in zip(masks, flags, strict=True):
        if not {0, 1}.issuperset(given):
            raise RecordInvalid(
                f"{key} must have 0 and 1 only, not {next(each for each in given if each not in (0, 1))}"
            )
    learned = [all(each) for each in zip(*flags, strict=True)]
    return Tokens(ids, tuple(i if yes else IGNORE for i, yes in zip(ids, learned or [True] * len(ids), strict=True)))


def _whole_numbers(value: Mapping[str, Any], key: str, length: int | None) -> tuple[int, ...]:
    numbers = value[key]
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise RecordInvalid(f"{key} must be a list of whole numbers")
    if length is not None and len(numbers) != length:
        raise RecordInvalid(f"{key} has {len(numbers)} numbers, input_ids has {length}")
    return tuple(numbers)


def _judged(value: Mapping[str, Any], parse: Callable[[bool], Answer]) -> Record:
    """The answer, with the label where there is one."""
    label = value.get("label")
    if label is None or label == "":
        return parse(False)
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(label, (bool, int, str)) and str(label).lower() in known:
        return Judged(parse(True), known[str(label).lower()])
    raise RecordInvalid(f"label must be true (a desirable answer) or false, not {label!r}")


_PAIR = _Format(PAIR_KEYS, parse_pair)
_TEXT = _Format(("text", "label"), _parse_text)
_COMPLETION = _Format(("prompt", "completion", "label", "tools"), _parse_completion)
_FORMATS: Final[Mapping[str, _Format]] = {
    "chosen": _PAIR,
    "rejected": _PAIR,
    "input_ids": _Format(("input_ids", "labels", "attention_mask", *_MASKS), _parse_tokens),
    "messages": _Format(("messages", "tools", "label", "prompt", "completion"), _parse_messages),
    "conversations": _Format(("conversations", "system", "tools", "label"), _parse_sharegpt),
    "instruction": _Format((*INSTRUCTION_KEYS, "output", "label"), _parse_instruction),
    "text": _TEXT,
}
"""What a record is, by the first of these keys that it has."""

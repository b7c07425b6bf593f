"""Preference records into pairs of answers: trl's forms with an explicit and an implicit prompt, as text or messages,
and those of Alpaca and ShareGPT.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

from loramux_trainer.data.record_formats import INSTRUCTION_KEYS, as_messages, instruction_prompt
from loramux_trainer.data.record_messages import conversation, refuse_unread
from loramux_trainer.data.record_types import Answer, Completion, Pair, RecordInvalid
from loramux_trainer.schema.data_config import DataConfig

PAIR_KEYS: Final = ("prompt", "chosen", "rejected", "tools", "conversations", *INSTRUCTION_KEYS)
_SIDES: Final = ("chosen", "rejected")
# Where the prompt may be -> what else is read with it.
_PROMPTS: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": (),
    "conversations": ("system",),
    "instruction": ("input", "system"),
}


def parse_pair(value: Mapping[str, Any], data: DataConfig | None) -> Pair:
    """Raises RecordInvalid."""
    if any(value.get(side) is None for side in _SIDES):
        raise RecordInvalid("a preference record needs both chosen and rejected")
    key, prompt = _prompt(value, data)
    chosen, rejected = (as_messages(side, value[side]) for side in _SIDES)
    if chosen == rejected:
        raise RecordInvalid("chosen and rejected are the same: there is nothing to prefer")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Pair(*_texts(value, key, prompt, chosen, rejected))
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RecordInvalid("chosen and rejected must be both strings, or both lists of messages")
    if isinstance(prompt, str) and all(_holds(messages, prompt) for messages in (chosen, rejected)):
        prompt = None  # the prompt again, as some sets have it
    if isinstance(prompt, str):
        raise RecordInvalid(f"{key} is a string, and chosen and rejected are messages that do not contain it")
    tools = value.get("tools")
    answers = zip(_SIDES, (chosen, rejected), strict=True)
    if prompt is None:
        context = _common_messages(chosen, rejected)
        return Pair(*(conversation({side: messages}, tools, context=context) for side, messages in answers))
    return Pair(*(conversation({key: prompt, side: messages}, tools) for side, messages in answers))


def _prompt(value: Mapping[str, Any], data: DataConfig | None) -> tuple[str, Any]:
    """(key, prompt as text or messages); None where chosen and rejected contain it."""
    given = [key for key in _PROMPTS if value.get(key) is not None]
    if len(given) > 1:
        raise RecordInvalid(f"give one of {' and '.join(given)}, not both")
    key = given[0] if given else "prompt"
    refuse_unread(value, (key, *_PROMPTS[key], *_SIDES, "tools"))
    if key == "instruction":
        return key, instruction_prompt(value, data.instruction_format if data else "chat")
    return key, as_messages(key, value.get(key), value.get("system"))


def _texts(value: Mapping[str, Any], key: str, prompt: Any, chosen: str, rejected: str) -> tuple[Answer, Answer]:
    for side in _SIDES:
        if not value[side]:
            raise RecordInvalid(f"{side} is empty: there is nothing to learn")
    if isinstance(prompt, list):
        sides = zip(_SIDES, (chosen, rejected), strict=True)
        one, other = (
            conversation({key: prompt, side: [{"role": "assistant", "content": text}]}, value.get("tools"))
            for side, text in sides
        )
        return one, other
    if value.get("tools"):
        raise RecordInvalid("tools belong to messages: a prompt must contain them as text")
    if prompt is None:
        border = _common_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:border], chosen[border:], rejected[border:]
    if not isinstance(prompt, str):
        raise RecordInvalid(f"{key} must be a string or a list of messages")
    return Completion(prompt, chosen), Completion(prompt, rejected)


def _common_text(chosen: str, rejected: str) -> int:
    """Where the prompt ends that both begin with: before the last blank in front of the first difference.

    trl cuts at the difference itself, which may be inside a word, and takes a blank there into the answer.
    """
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    return max(0, *(chosen.rfind(blank, 0, same) for blank in " \n\t"))


def _common_messages(chosen: list[Any], rejected: list[Any]) -> int:
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same in (len(chosen), len(rejected)):
        raise RecordInvalid("one of chosen and rejected begins with all of the other: they must part at an answer")
    for messages, side in ((chosen, "chosen"), (rejected, "rejected")):
        if not isinstance(messages[same], Mapping) or messages[same].get("role") != "assistant":
            raise RecordInvalid(
                f"chosen and rejected part at {side}[{same}], which is not the assistant's: their prompts must be equal"
            )
    return same


def _holds(messages: list[Any], prompt: str) -> bool:
    return any(isinstance(message, Mapping) and message.get("content") == prompt for message in messages[:-1])

"""Which message of a conversation a chat template fails on, found by rendering it with other messages in their place.

A template is a program and says little of why it failed. What is told is what was seen: the same conversation renders
when that message, or its content alone, is plain text. Knows no template and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Message = Mapping[str, Any]
Renders = Callable[[Sequence[Message]], bool]

_MOST_MESSAGES: Final = 512  # renderings take long, and there are about as many of them as this number has bits
_TEXT: Final = "text"


class ChatRefused(ValueError):
    """The caller must act: these messages cannot be rendered. The message is fit for a stranger.

    `where` is the message or the key at fault, such as `[2].content`; empty where that is not known.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True)
class Fault:
    """The first message that a template fails on and what was seen of it."""

    where: str
    why: str


def find_fault(messages: Sequence[Message], renders: Renders) -> Fault | None:
    """For messages that do not render: the first at fault; None where plain messages of these roles fail as well."""
    plain = [_plain(message) for message in messages]
    odd = [index for index, message in enumerate(messages) if message != plain[index]]
    if not odd or len(messages) > _MOST_MESSAGES or not renders(plain):
        return None
    renders_with, fails_with = 0, len(odd)  # so many of the odd ones as they are, the others plain
    while fails_with - renders_with > 1:
        middle = (renders_with + fails_with) // 2
        if renders(_mixed(messages, plain, odd[middle])):
            renders_with = middle
        else:
            fails_with = middle
    index = odd[renders_with]
    texted = {**messages[index], "content": _TEXT}
    if not isinstance(messages[index].get("content"), str) and renders(
        [*messages[:index], texted, *plain[index + 1 :]]
    ):
        return Fault(f"[{index}].content", f"it fails {_kind(messages[index])} here, and takes text")
    return Fault(f"[{index}]", "it fails on this message, and takes one that has no more than its role and a text")


def _mixed(messages: Sequence[Message], plain: Sequence[Message], end: int) -> list[Message]:
    return [*messages[:end], *plain[end:]]


def _plain(message: Message) -> Message:
    content = message.get("content")
    return {"role": message.get("role"), "content": content if isinstance(content, str) else _TEXT}


def _kind(message: Message) -> str:
    match message.get("content"):
        case None:
            return "on null" if "content" in message else "without a content"
        case list():
            return "on a list"
        case dict():
            return "on an object"
        case _:
            return "on what is no text"

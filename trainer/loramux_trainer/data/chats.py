"""Conversations into the turns that carry a loss: the prompt the server would render, and what the template adds to it.

Works on text, not on ids.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loramux_trainer.data.record_messages import REASONING_KEYS
from loramux_trainer.data.record_types import Conversation, RecordInvalid

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Turn:
    """`prompt` is what the server would render before `answer`; the loss falls on `spans`, characters of `answer`."""

    index: int  # among the messages
    prompt: str
    answer: str
    spans: Spans


class ChatRenderer:
    """Renders by one template, as the server does. `special_tokens` are the names templates know (`bos_token`)."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any]) -> None:
        self._template, self._special_tokens = template, dict(special_tokens)
        self._marked = _marks_generation(template)

    @property
    def marks_generation(self) -> bool:
        """Whether the template has {% generation %} blocks."""
        return self._marked

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the server renders before the answer to `messages`. Raises RecordInvalid."""
        return self._render(Conversation(tuple(messages), ()), len(messages), prompt=True)[0]

    def turns(self, conversation: Conversation) -> Iterator[Turn]:
        """Each trained turn, in order. Raises RecordInvalid."""
        if conversation.tools and self._is_unused(conversation, dataclasses.replace(conversation, tools=None)):
            raise RecordInvalid("tools: the base's chat template does not use them; remove them, or write them as text")
        for index in conversation.trained:
            yield self._turn(conversation, index)

    def _turn(self, conversation: Conversation, index: int) -> Turn:
        where = f"messages[{index}]"
        rendered, marks = self._render(conversation, index + 1)
        self._refuse_unused(conversation, index)
        if index:
            prompt, _ = self._render(conversation, index, prompt=True)
            if not rendered.startswith(prompt):
                raise RecordInvalid(self._explain_border(conversation, index, rendered, prompt))
        elif marks:
            prompt = rendered[: marks[0][0]]
        else:
            raise RecordInvalid(
                f"{where}: the first message is the assistant's, which has no prompt with this chat template"
            )
        answer = rendered[len(prompt) :]
        spans: Spans = ((0, len(answer)),)
        if self._marked:
            shifted = ((begin - len(prompt), end - len(prompt)) for begin, end in marks)
            spans = tuple((max(begin, 0), end) for begin, end in shifted if end > max(begin, 0))
        if not spans or not answer:
            raise RecordInvalid(
                f"{where} has nothing to learn: the chat template renders nothing for it, or its {{% generation %}} "
                "block is in a branch that this turn does not take"
            )
        return Turn(index, prompt, answer, spans)

    def _refuse_unused(self, conversation: Conversation, index: int) -> None:
        """What the data wants learned must be in the text: templates ignore keys that they do not use."""
        message = conversation.messages[index]
        for key in ("tool_calls", *REASONING_KEYS):
            if not message.get(key):
                continue
            without = {name: value for name, value in message.items() if name != key}
            messages = (*conversation.messages[:index], {"content": "", **without})
            whole = dataclasses.replace(conversation, messages=conversation.messages[: index + 1])
            if self._is_unused(whole, dataclasses.replace(whole, messages=messages)):
                raise RecordInvalid(
                    f"messages[{index}].{key}: the base's chat template does not use it; write it into the content, "
                    "or remove it"
                )

    def _is_unused(self, whole: Conversation, without: Conversation) -> bool:
        """Whether both render to the same text, so that what only the first one has is unused."""
        try:
            return self._render(without, len(without.messages))[0] == self._render(whole, len(whole.messages))[0]
        except RecordInvalid:
            return False  # the template needs it, or rendering the turn raises what is wrong

    def _explain_border(self, conversation: Conversation, index: int, rendered: str, prompt: str) -> str:
        """Why a turn does not begin with the prompt that the server would render for it, and what to do."""
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rendered, prompt, strict=False)))
        before, _ = self._render(conversation, index)
        if not prompt.startswith(before) or not rendered.startswith(before):
            return (
                f"the chat template renders the messages before messages[{index}] in another way once that turn "
                "follows them: give this record as prompt and completion, with the prompt as the template renders it"
            )
        opened = prompt[same:]
        return (
            f"the chat template's generation prompt continues with {opened!r}, but messages[{index}] is rendered with "
            f"{rendered[same : same + 24]!r} there, which no request produces: begin the content with "
            f"{opened.strip()!r}, or, where the template removes that, give this record as prompt and completion"
        )

    def _render(self, conversation: Conversation, count: int, *, prompt: bool = False) -> tuple[str, Spans]:
        """(the first `count` messages as text, the characters in {% generation %} blocks)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # A key without a value is left out, as apply_chat_template does for the server.
            messages: Sequence[Any] = [
                {key: value for key, value in message.items() if value is not None}
                for message in conversation.messages[:count]
            ]
            texts, marks = render_jinja_template(
                conversations=[messages],
                tools=None if conversation.tools is None else list(conversation.tools),
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template runs arbitrary expressions, and refuses by raise_exception
            raise RecordInvalid(f"the chat template refused: {error}") from error
        return texts[0], tuple(marks[0]) if marks else ()


@lru_cache(maxsize=8)
def _marks_generation(template: str) -> bool:
    """Whether the template has a {% generation %} block, and not only the words of one in a comment."""
    import jinja2

    try:
        tokens = [
            (kind, value)
            for _, kind, value in jinja2.Environment(autoescape=False).lex(template)
            if kind != "whitespace"
        ]
    except jinja2.TemplateSyntaxError:
        return False  # rendering raises what is wrong
    return any(
        kind == "block_begin" and following == ("name", "generation")
        for (kind, _), following in itertools.pairwise(tokens)
    )

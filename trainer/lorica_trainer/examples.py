"""One line of a JSONL file into token ids and labels: prompt-completion text, or chat through the base's own template.

The loss falls on completions and assistant turns only, their end-of-turn token included: an adapter that never
learnt it would never stop. Knows no file and no batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

IGNORE = -100
ROLES = ("system", "user", "assistant", "tool")


class ExampleInvalid(ValueError):
    """What is wrong with one record; the reader adds file and line."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Example:
    """`labels` equals `ids` where the loss falls and IGNORE elsewhere; same length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Tokens that are predicted with a loss; the first token of a sequence is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])

    def truncated(self, length: int) -> Example:
        """The first `length` tokens."""
        return Example(self.ids[:length], self.labels[:length])


def encode_record(record: Any, tokenizer: ChatTokenizer, end_ids: frozenset[int]) -> Example:
    """Encode {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}. Raises ExampleInvalid."""
    if not isinstance(record, Mapping):
        raise ExampleInvalid("a record must be a JSON object")
    if "messages" in record:
        example = _encode_chat(_checked_messages(record["messages"]), tokenizer)
    elif "prompt" in record and "completion" in record:
        example = _encode_completion(record["prompt"], record["completion"], tokenizer)
    else:
        raise ExampleInvalid("a record needs either messages, or prompt and completion")
    _check_end_is_learnt(example, end_ids)
    return example


def _encode_completion(prompt: Any, completion: Any, tokenizer: ChatTokenizer) -> Example:
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ExampleInvalid("prompt and completion must be strings")
    _refuse_half_characters("prompt", prompt)
    _refuse_half_characters("completion", completion)
    if not completion:
        raise ExampleInvalid("completion is empty: there is nothing to learn")
    if tokenizer.eos_token_id is None:
        raise ExampleInvalid("the base's tokenizer has no end-of-sequence token to end a completion with")
    # Encoded apart, because the server encodes the prompt alone and the model goes on from there.
    head = tokenizer.encode(prompt)
    tail = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
    return Example((*head, *tail), (*[IGNORE] * len(head), *tail))


def _checked_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ExampleInvalid("messages must be a non-empty list")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ExampleInvalid(f"messages[{index}] needs a role and a content string")
        if message.get("role") not in ROLES:
            raise ExampleInvalid(
                f"messages[{index}].role must be one of {', '.join(ROLES)}, not {message.get('role')!r}"
            )
        for key, value in message.items():
            if isinstance(value, str):
                _refuse_half_characters(f"messages[{index}].{key}", value)
    if messages[-1]["role"] != "assistant":
        raise ExampleInvalid("the last message must be the assistant's: there is nothing to learn")
    return [dict(message) for message in messages]


def _refuse_half_characters(where: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no text: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ExampleInvalid(
            f"{where} holds half a character at position {error.start}: \\u{ord(text[error.start]):04x} without the "
            "other half of its pair"
        ) from error


def _encode_chat(messages: list[dict[str, str]], tokenizer: ChatTokenizer) -> Example:
    if not tokenizer.chat_template:
        raise ExampleInvalid("the base has no chat template: use prompt and completion")
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
        marked = _apply_template(tokenizer, messages, return_assistant_tokens_mask=True)
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        return Example(tuple(ids), tuple(i if m else IGNORE for i, m in zip(ids, mask, strict=True)))
    return _encode_chat_by_prefix(messages, tokenizer)


def _encode_chat_by_prefix(messages: list[dict[str, str]], tokenizer: ChatTokenizer) -> Example:
    """Each assistant turn is what the template adds to the prompt that the server would have answered."""
    if messages[0]["role"] == "assistant":
        raise ExampleInvalid("the assistant speaks first: with this chat template there is no prompt for it to answer")
    whole = _rendered(tokenizer, messages, prompt=False)
    labels = [IGNORE] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _rendered(tokenizer, messages[:index], prompt=True)
        end = _rendered(tokenizer, messages[: index + 1], prompt=False)
        if end[: len(start)] != start or whole[: len(end)] != end:
            raise ExampleInvalid(
                f"the chat template renders messages[{index}] differently once later turns follow; "
                "split the conversation so that the assistant speaks only last"
            )
        labels[len(start) : len(end)] = whole[len(start) : len(end)]
    return Example(tuple(whole), tuple(labels))


def _rendered(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
    return list(_apply_template(tokenizer, messages, add_generation_prompt=prompt)["input_ids"])


def _apply_template(tokenizer: ChatTokenizer, messages: list[dict[str, str]], **options: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template runs arbitrary expressions, and says by raise_exception what it refuses
        raise ExampleInvalid(f"the chat template refused: {error}") from error


def _check_end_is_learnt(example: Example, end_ids: frozenset[int]) -> None:
    for supervised, run in itertools.groupby(example.labels, key=lambda label: label != IGNORE):
        if supervised and end_ids.isdisjoint(run):
            raise ExampleInvalid(
                "a supervised turn does not hold the base's end-of-turn token, so its end would not be learnt; "
                "the chat template must put the token inside the assistant's turn"
            )

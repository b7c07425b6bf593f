"""Records into token ids and labels, cut where the server cuts: its prompt's ids, then the ids that continue them.

The loss falls on completions and trained turns only, their end token included: an adapter that never learned it would
never stop. Knows no file and no batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramux_adapters.tokenization import ContinuationRefused, PromptTokenizer, find_chat_template
from loramux_trainer.data.chats import ChatRenderer, Turn
from loramux_trainer.data.record_types import Answer, Completion, Conversation, RecordInvalid, Tokens

IGNORE = -100


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


@dataclass(frozen=True)
class Unit:
    """One element of a batch, which is never torn over two steps: one example; several of a pack, which never see each
    other; chosen and rejected of a pair, in this order; or one with the label of KTO (true: desirable).
    """

    rows: tuple[Example, ...]
    label: bool | None = None

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(len(row.ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        """Tokens that are predicted with a loss, of all rows together."""
        return sum(row.supervised for row in self.rows)


class ExampleEncoder:
    """Encodes for one base: its tokenizer, the ids that end a text, and the number of ids its embedding has."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], vocabulary: int) -> None:
        self.end_ids = end_ids
        self._prompts = PromptTokenizer(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._vocabulary = vocabulary
        template = find_chat_template(tokenizer)
        self._renderer = None if template is None else ChatRenderer(template, tokenizer.special_tokens_map)

    @property
    def marks_generation(self) -> bool:
        """Whether the base's chat template says by {% generation %} blocks what is learned."""
        return self._renderer is not None and self._renderer.marks_generation

    def encode(self, record: Answer | Tokens) -> tuple[Example, ...]:
        """The record's examples: one, or for a conversation whose turns the server would cut otherwise than one
        sequence can hold, several. Raises RecordInvalid.
        """
        try:
            if isinstance(record, Completion):
                examples: Sequence[Example] = [self._encode_completion(record)]
            elif isinstance(record, Tokens):
                examples = [self._check_tokens(record)]
            else:
                examples = list(self._encode_chat(record))
        except ContinuationRefused as error:
            raise RecordInvalid(str(error)) from error
        for example in examples:
            if not example.supervised:
                raise RecordInvalid("no token of the record carries a loss: there is nothing to learn")
            self._check_vocabulary(example)
            if self._bos is not None and example.ids[:2] == (self._bos, self._bos):
                raise RecordInvalid(
                    f"begins with {self._prompts.token_text(self._bos)} twice, which no request does: remove it from "
                    "the record"
                )
        return tuple(examples)

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """What the server has before the answer to a text or to messages. Raises RecordInvalid."""
        if isinstance(prompt, str):
            return self._prompts.encode_prompt(prompt)
        if self._renderer is None:
            raise RecordInvalid("the base has no chat template: give the prompt as a text")
        return self._prompts.encode_rendered(self._renderer.prompt(prompt))

    def _encode_completion(self, record: Completion) -> Example:
        if self._eos is None:
            raise RecordInvalid("the base's tokenizer has no end-of-sequence token to end a completion with")
        head = self._prompts.encode_prompt(record.prompt)
        tail = self._prompts.encode_continuation(record.prompt, head, record.completion)
        if not record.prompt and self._bos is not None and head[-1:] == tail[:1] == [self._bos]:
            head = head[:-1]  # a text that was rendered already begins with it
        if tail[-1:] != [self._eos]:  # a completion that was rendered already ends with it
            tail.append(self._eos)
        return Example((*head, *tail), (*[IGNORE] * len(head), *tail))

    def _check_tokens(self, record: Tokens) -> Example:
        """As they are. What ends them must be learned, where it is there: padding with the end token masks it often."""
        if record.ids[-1] in self.end_ids and record.labels[-1] == IGNORE:
            raise RecordInvalid(
                f"input_ids ends with {self._prompts.token_text(record.ids[-1])} ({record.ids[-1]}), at which the base "
                "stops, but carries no loss there, so that the end would not be learned: give it its label"
            )
        return Example(record.ids, record.labels)

    def _encode_chat(self, record: Conversation) -> Iterator[Example]:
        """Turns share a sequence as long as each one's prompt, encoded alone, continues what is there."""
        if self._renderer is None:
            raise RecordInvalid("the base has no chat template: use prompt and completion")
        ids: list[int] = []
        labels: list[int] = []
        for turn in self._renderer.turns(record):
            head = self._prompts.encode_rendered(turn.prompt)
            if head[: len(ids)] != ids:
                yield Example(tuple(ids), tuple(labels))
                ids, labels = [], []
            labels += [IGNORE] * (len(head) - len(ids))
            ids = head
            answer, answer_labels = self._encode_answer(turn, head)
            ids, labels = ids + answer, labels + answer_labels
        yield Example(tuple(ids), tuple(labels))

    def _encode_answer(self, turn: Turn, head: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        borders = sorted({0, len(turn.answer), *itertools.chain.from_iterable(turn.spans)})
        for begin, end in itertools.pairwise(borders):
            before = turn.prompt + turn.answer[:begin]
            piece = self._prompts.encode_continuation(before, [*head, *ids], turn.answer[begin:end])
            learned = any(first <= begin and end <= last for first, last in turn.spans)
            ids += piece
            labels += piece if learned else [IGNORE] * len(piece)
        self._check_end_is_learned(turn, ids, labels)
        return ids, labels

    def _check_end_is_learned(self, turn: Turn, ids: Sequence[int], labels: Sequence[int]) -> None:
        if not self.end_ids.isdisjoint(labels):
            return
        where = f"messages[{turn.index}]"
        if not self.end_ids.isdisjoint(ids):
            raise RecordInvalid(
                f"{where} ends with the base's end token, but outside of the chat template's {{% generation %}} block, "
                "so its end would not be learned: the block must contain it"
            )
        ends = ", ".join(f"{self._prompts.token_text(i)} ({i})" for i in sorted(self.end_ids)) or "none"
        special = set(self._prompts.special_tokens.values())
        last = next((i for i in reversed(ids) if i in special), None)
        if last is None:
            raise RecordInvalid(
                f"{where} is rendered without a token that ends it, so its end would not be learned: the chat template "
                f"must write one of the base's end tokens behind it ({ends})"
            )
        raise RecordInvalid(
            f"{where} ends with {self._prompts.token_text(last)}, at which the base does not stop (it stops at "
            f"{ends}): add its id {last} to eos_token_id in the base's generation_config.json, "
            "which server and trainer read"
        )

    def _check_vocabulary(self, example: Example) -> None:
        position, token = max(enumerate(example.ids), key=lambda pair: pair[1])
        if token >= self._vocabulary:
            raise RecordInvalid(
                f"{self._prompts.token_text(token)!r} is token id {token} at position {position}, which is outside the "
                f"model's vocabulary of {self._vocabulary}: remove it from the text, or use a base whose embedding was "
                "resized for it"
            )

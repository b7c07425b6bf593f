"""One tokenization for serving and training: a prompt's ids, the ids that go on from them, and the text of these.

Works on any Hugging Face tokenizer by what it does, not by its family: prefix rules (SentencePiece's dummy blank,
byte-level `add_prefix_space`) and post-processors (BOS before, EOS after) are found by probes at construction. Imports
no tokenizer library. Knows no messages and no loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

CONTEXT_TOKENS: Final = 8
"""How many tokens of a prompt's end the text of an output depends on."""

_ANCHORS: Final = ("\n", ".", ":", "=", "a", "0")
"""Texts that a continuation is encoded behind when it merges with its own prompt's end: one of them does not merge."""

_REPLACEMENT: Final = "�"


class ContinuationRefused(ValueError):
    """No token ids stand for the text where it would go on from the prompt."""


class PromptTokenizer:
    """What a prompt is in ids, and what an output after it is in text. Adds no lock of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._prefix = self._find_prefix()
        self._restarts = self._find_restart()
        self._anchor = self._find_anchor()

    def extended(self, tokenizer: Any, special: Mapping[int, str]) -> PromptTokenizer:
        """The same with `special` tokens more, on a tokenizer that differs in added tokens alone: nothing is probed."""
        made = copy.copy(self)
        made._tokenizer, made._special = tokenizer, {**self._special, **special}
        return made

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of every token that decoding leaves out."""
        return {content: token for token, content in self._special.items() if content}

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of plain text, behind the special tokens that the base expects before it (BOS, mostly).

        They are not put before a text that already begins with them. What a post-processor puts after a text (EOS)
        would end it and is left out.
        """
        ids = self.encode_rendered(text)
        return ids if tuple(ids[: len(self._prefix)]) == self._prefix else [*self._prefix, *ids]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text that holds its special tokens itself, as a chat template writes it."""
        return self._encode(text, add_special_tokens=False)

    def encode_continuation(self, prompt: str, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Ids that go on from `prompt_ids`, those of `prompt`, and that are streamed as exactly `text`.

        A prompt is encoded without knowledge of what follows it. So ids that straddle the border, or that begin with
        the blank of a new text, would teach what is never asked for. A tokenizer that does not keep the text
        (lower-casing, unknown tokens) gives what it makes of it. Raises ContinuationRefused.
        """
        candidates = []
        for ids in self._continuations(prompt, text):
            if self._spells(prompt_ids, ids, text):
                return ids
            candidates.append(ids)
        if not candidates or self._keeps(prompt, prompt_ids, candidates[0], text):
            # Where decoding takes one blank away, one more than the text has is streamed as the text.
            for ids in self._continuations(prompt, " " + text):
                if self._spells(prompt_ids, ids, text):
                    return ids
            raise ContinuationRefused(
                f"the tokenizer has no tokens for {text[:20]!r} right behind {prompt[-20:]!r}: move the border between "
                "them by a word"
            )
        return candidates[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; an incomplete character becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def output_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The ids of the prompt's end that the text of an output is to be decoded behind.

        Where the tokenizer begins a new text after a special token, dummy blank included, so does decoding. Where it
        does not, special tokens alone would be no context, and decoding would take away a blank that the tokenizer
        never put there: a letter stands for them. BOS alone is the begin of a text.
        """
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        if not self._restarts:
            only_special = bool(context) and all(token in self._special for token in context)
            return list(self._anchor) if only_special and tuple(prompt_ids) != self._prefix else context
        return list(takewhile(lambda token: token not in self._special, reversed(context)))[::-1]

    def output_text(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that is streamed for `ids` after the prompt."""
        context = self.output_context(prompt_ids)
        before = self.decode(context) if context else ""
        text = self.decode([*context, *ids])
        return text[len(before if text.startswith(before) else before.rstrip(_REPLACEMENT)) :]

    def token_text(self, token: int) -> str:
        """How a message names a token: a special one by its text, another by what it decodes to."""
        return self._special.get(token) or self.decode([token])

    def _continuations(self, prompt: str, text: str) -> Iterator[list[int]]:
        """Candidates, the most natural one first."""
        for before in (prompt, *_ANCHORS, ""):
            head, whole = self.encode_rendered(before), self.encode_rendered(before + text)
            if whole[: len(head)] == head:
                yield whole[len(head) :]

    def _spells(self, prompt_ids: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Whether `ids` read as `text` up to the first special token, and it stands where the text has it."""
        plain = list(takewhile(lambda token: token not in self._special, ids))
        said = self.output_text(prompt_ids, plain)
        if not text.startswith(said):
            return False
        rest = text[len(said) :]
        if len(plain) == len(ids):
            return not rest
        return rest.lstrip().startswith(self._special[ids[len(plain)]])  # a token may take the blanks before it

    def _keeps(self, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Whether the tokenizer tells `text` from what `ids`, its own choice, read as, and gives such a text back."""
        said = self.output_text(prompt_ids, ids)
        if self.encode_rendered(prompt + said) == self.encode_rendered(prompt + text):
            return False
        return any(self.decode(self.encode_rendered(anchor + text)) == anchor + text for anchor in _ANCHORS)

    def _find_prefix(self) -> tuple[int, ...]:
        for probe in ("a", "0", "."):
            plain, full = self.encode_rendered(probe), self._encode(probe, add_special_tokens=True)
            for start in range(len(full) - len(plain) + 1):
                if plain and full[start : start + len(plain)] == plain:
                    return tuple(full[:start])
        return ()

    def _find_restart(self) -> bool:
        """Whether text after a special token is encoded like the begin of a text."""
        alone = self.encode_rendered("a")
        for token, content in self._special.items():
            ids = self.encode_rendered(content + "a")
            if ids[:1] == [token]:
                return ids[1:] == alone
        return False

    def _find_anchor(self) -> tuple[int, ...]:
        """Plain ids that stand behind a special token as exactly their text; letters, which no character continues."""
        for token, content in self._special.items():
            for text in ("a", "0", "."):
                ids = self.encode_rendered(content + text)
                if ids[:1] == [token] and self.decode(ids[1:]) == text:
                    return tuple(ids[1:])
        return ()

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))


def find_chat_template(tokenizer: Any) -> str | None:
    """The template that conversations are rendered by; None where there is none, or several without a default."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template

"""Text to token ids and back, by the base's own tokenizer and chat template.

The one place that knows a tokenizer's library; importing this module does not load it, since
transformers brings torch along. Knows no requests and no model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_adapters.tokenization import PromptTokenizer, find_chat_template
from loramux_server.text.chat_faults import ChatRefused, Fault, find_fault

MAX_CHAT_CHARACTERS: Final = 4 << 20
"""Of all messages together; rendering and encoding more only costs time, as no context holds it."""

_TOOLS: Final = re.compile(r"\btools\b")
_FAULT_SECONDS: Final = 1.0  # for finding the message that a template fails on
_FLAGS: Final = ("special", "lstrip", "rstrip", "single_word", "normalized")
_NO_LIMIT: Final = 1 << 62  # tokens; lengths are checked by the server, which knows the model's context


class TextTokenizer:
    """Encodes and decodes for one base. Safe from any thread."""

    waits = False

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int] = frozenset()) -> None:
        """`tokenizer` is one of transformers and ours alone: padding and truncation are switched off for good."""
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self._eos_token_ids = eos_token_ids | (frozenset() if own is None else {own})
        self._own_roles: Mapping[
            str, str
        ] = {}  # of special tokens, where they are other than the library's object says
        self._set_template(find_chat_template(tokenizer))
        tokenizer.model_max_length = _NO_LIMIT
        vocabulary = tokenizer.get_vocab()  # what is asked of it later is kept: it is made anew each time
        self._longest_token = max((len(piece.encode()) for piece in vocabulary), default=1)
        self._slow_ids: Mapping[str, int] = {} if tokenizer.is_fast else vocabulary
        self._vocab_size = max(vocabulary.values(), default=-1) + 1
        self._added = {token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items()}
        self._lock: AbstractContextManager[Any] = nullcontext()
        self._spelling: _Spelling | None = None
        if tokenizer.is_fast:
            # Its settings are borrowed for writing by each call that finds them set, and then concurrent
            # calls raise "Already borrowed": without settings, calls only read and need no lock.
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
            self._spelling = _Spelling.of(json.loads(backend.to_str()))
        else:
            self._lock = threading.Lock()
        self._prompts = PromptTokenizer(tokenizer)
        self._special_tokens = dict(self._prompts.special_tokens)

    def _set_template(self, template: str | None) -> None:
        self._template = template
        self._template_digest = "" if template is None else hashlib.sha256(template.encode()).hexdigest()

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> TextTokenizer:
        """The codec of a model directory or hub id. Raises OSError or ValueError if there is no tokenizer."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
        return cls(tokenizer, _find_eos_token_ids(str(source), revision))

    @property
    def references(self) -> list[str]:
        """The tokenizer as tokenizer.json, as adapters may have saved it: as it is loaded, and as it lies there.

        Empty where it is of another kind. Takes long.
        """
        if not self._tokenizer.is_fast:
            return []
        path = Path(str(self._tokenizer.name_or_path)) / "tokenizer.json"
        return [self._tokenizer.backend_tokenizer.to_str(), *([path.read_text("utf-8")] if path.is_file() else [])]

    @property
    def roles(self) -> Mapping[str, str]:
        """Special tokens by role, such as eos_token."""
        known = self._tokenizer.special_tokens_map
        return {role: str(token) for role, token in known.items() if isinstance(token, str)} | dict(self._own_roles)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tokenizer_config.json says."""
        return dict(self._tokenizer.init_kwargs)

    @property
    def template(self) -> str | None:
        """The chat template."""
        return self._template

    def find_id(self, token: str) -> int | None:
        """The id of a token as the library spells it; None where there is none."""
        if self._tokenizer.is_fast:
            found: int | None = self._tokenizer.backend_tokenizer.token_to_id(token)
            return found
        return self._slow_ids.get(token)

    def extended(self, added: Sequence[Mapping[str, Any]]) -> Any:
        """The library's object with more tokens, entries of tokenizer.json; only of one that is_fast.

        It shares the model with this one: a copy would be made of text, by one call that holds the interpreter for as
        long as a large vocabulary takes.
        """
        from tokenizers import AddedToken, Tokenizer

        backend = self._tokenizer.backend_tokenizer
        made = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if (own := getattr(backend, part)) is not None:
                setattr(made, part, own)
        made.encode_special_tokens = backend.encode_special_tokens
        known = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
        new = [AddedToken(entry["content"], **{key: bool(entry[key]) for key in _FLAGS}) for entry in added]
        made.add_tokens([*known, *new])  # all at once: each call builds the matcher of all tokens anew
        return copy.deepcopy(self._tokenizer, {id(self._tokenizer._tokenizer): made})

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can give, and the one that a token added to it gets; a model may have more rows."""
        return self._vocab_size

    @property
    def longest_token(self) -> int:
        """Bytes of the longest piece of text that one token can stand for."""
        return self._longest_token

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of every token that no text shows."""
        return self._special_tokens

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text: the tokenizer's and those of the generation config."""
        return self._eos_token_ids

    @property
    def template_digest(self) -> str:
        """sha256 of the chat template in hex, empty when the base has none."""
        return self._template_digest

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, behind the special tokens the base expects there."""
        with self._lock:
            return self._prompts.encode_prompt(text)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template does anything with tools."""
        return self._template is not None and _TOOLS.search(self._template) is not None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        most_characters: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises ChatRefused when there is no template, it refuses the messages, or what it makes of them is too long.
        """
        rendered = self.render_chat(messages, tools)
        if most_characters is not None and len(rendered) > most_characters:
            raise ChatRefused(f"the template makes {len(rendered)} characters of them, which no context holds")
        with self._lock:
            return self._prompts.encode_rendered(rendered)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that `encode_chat` encodes; raises as it does."""
        if self._template is None:
            raise ChatRefused("the base has no chat template; send text instead")
        characters = _count_characters([*messages, *tools])
        if characters > MAX_CHAT_CHARACTERS:
            raise ChatRefused(f"{characters} characters of messages, of at most {MAX_CHAT_CHARACTERS}")
        from jinja2.exceptions import TemplateError

        try:
            return self._render(messages, tools)
        except ChatRefused:
            raise
        except Exception as error:
            # A template runs arbitrary expressions. What it says itself by raise_exception is meant for the
            # caller; anything else would only tell about our insides.
            fault = self._find_fault(messages, tools)
            said = fault.why if fault else "it failed on these messages"
            if type(error) is TemplateError:
                said = str(error)
            raise ChatRefused(f"the chat template refused: {said}", fault.where if fault else "") from error

    def _find_fault(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Fault | None:
        """None where it is not found in time: a rendering may take seconds, and others wait meanwhile."""
        end = time.monotonic() + _FAULT_SECONDS

        def renders(others: Sequence[Mapping[str, Any]]) -> bool:
            if time.monotonic() > end:
                raise TimeoutError
            return self._renders(others, tools)

        try:
            return find_fault(messages, renders)
        except TimeoutError:
            return None

    def _renders(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
        try:
            self._render(messages, tools)
        except Exception:  # as above
            return False
        return True

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        with self._lock:
            rendered: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._own_roles,
            )
        return rendered

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; an incomplete character becomes U+FFFD.

        Ids without a token have no text: a model may have more rows, and so may an adapter.
        """
        if not self._tokenizer.is_fast:  # the others leave them out by themselves
            ids = [token for token in ids if token < self.vocab_size]
        with self._lock:
            return self._prompts.decode(ids)

    def output_context(self, prompt: Sequence[int]) -> list[int]:
        """The ids of the prompt's end that an output's text is decoded behind."""
        return self._prompts.output_context(prompt)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, special tokens by their name; empty for ids without a token."""
        if not 0 <= token < self.vocab_size:
            return b""
        added = self._added.get(token)
        if added is not None:
            return added.encode()
        with self._lock:
            piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._spelling is None:
            return self.decode([token]).encode()
        return self._spelling.spell(piece)


@dataclass(frozen=True)
class _Spelling:
    """How a tokenizer's vocabulary writes bytes: found in the decoder part of tokenizer.json."""

    byte_level: bool  # one printable character a byte, as GPT-2 does
    byte_fallback: bool  # <0xE2> is a byte, as SentencePiece does
    space: str | None  # character that stands for a space

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> _Spelling:
        decoder = tokenizer.get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        space = None
        for part in parts:
            if part.get("type") == "Metaspace":
                space = part.get("replacement")
            elif part.get("type") == "Replace" and part.get("content") == " ":
                space = part.get("pattern", {}).get("String")
        kinds = {part.get("type") for part in parts}
        return cls("ByteLevel" in kinds, "ByteFallback" in kinds, space)

    def spell(self, piece: str) -> bytes:
        if self.byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if self.byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return (piece.replace(self.space, " ") if self.space else piece).encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the rest for code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_characters()


def _count_characters(value: Any) -> int:
    """Of all strings in a JSON value, keys included, however deep."""
    total, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, Mapping):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, Sequence):
            left += part
    return total


def _find_eos_token_ids(source: str, revision: str | None) -> frozenset[int]:
    """Ids of the generation config, or of the model's config when there is none."""
    from transformers import GenerationConfig, PreTrainedConfig

    readers: tuple[Callable[[], Any], ...] = (
        lambda: GenerationConfig.from_pretrained(source, revision=revision).eos_token_id,
        lambda: PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("eos_token_id"),
    )
    for read in readers:
        try:
            found = read()
        except OSError:
            continue
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()

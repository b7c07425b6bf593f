"""Small tokenizers for tests: bytes as ids, pieces with byte fallback, and directories that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|ü|>")


class ByteTokenizer:
    """Id i < 256 is the byte i; after them come `pieces` of several bytes, and last one special token, the end."""

    def __init__(self, pieces: Sequence[bytes] = ()) -> None:
        self._bytes = [bytes([i]) for i in range(256)] + list(pieces)
        self.eos = len(self._bytes)
        self.vocab_size = self.eos + 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids if i != self.eos).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return "<|end|>" if token == self.eos else self.decode([token])


def piece_decode(pieces: Sequence[str]) -> Callable[[Sequence[int]], str]:
    """How a SentencePiece model with byte fallback decodes: ids 0-255 are byte tokens, then come `pieces`."""
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [f"<0x{i:02X}>" for i in range(256)] + list(pieces)
    return lambda ids: decoder.decode([tokens[i] for i in ids])


def write_byte_level(
    directory: Path, *, chat_template: str | None = CHAT_TEMPLATE, words: Sequence[str] = (), eos: object = 1
) -> Path:
    """A byte-level BPE tokenizer as a model directory has it: special tokens, then 256 bytes, then `words`."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if eos is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return directory


FAMILY_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
_WORDS = ("the", "cat", "hello", "= ", "==", "an", "and", "swer")
FAMILIES = (
    "byte-level",
    "byte-level-prefix-space",
    "metaspace-first",
    "metaspace-always",
    "metaspace-never",
    "legacy-llama",
    "unigram",
)


def make_family(family: str, *, template: str = "<s> $A </s>") -> PreTrainedTokenizerFast:
    """A small tokenizer with the prefix rule of its family, merges across words, and a post-processor of `template`."""
    if family.startswith("byte-level"):
        tokenizer = _byte_level(add_prefix_space=family == "byte-level-prefix-space")
    else:
        tokenizer = _sentencepiece(family)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in FAMILY_SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)] if template != "$A" else []
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _byte_level(*, add_prefix_space: bool) -> tokenizers.Tokenizer:
    pieces = [*FAMILY_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = _merges(pieces, [word.replace(" ", "Ġ") for word in (*_WORDS, *(f" {word}" for word in _WORDS))])
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(family: str) -> tokenizers.Tokenizer:
    characters = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    pieces = [*FAMILY_SPECIAL_TOKENS, *(f"<0x{i:02X}>" for i in range(256)), *characters]
    words = [word.replace(" ", "▁") for word in (*_WORDS, *(f" {word}" for word in _WORDS))]
    strip = [decoders.Strip(" ", 1, 0)]
    if family == "unigram":
        scores = [(piece, -10.0 - (i % 7)) for i, piece in enumerate([*pieces, *words])]
        tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        merges = _merges(pieces, words)
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
    if family == "legacy-llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if family == "unigram" else family.removeprefix("metaspace-")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=family == "unigram")
        strip = [] if scheme == "never" else strip
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(pieces: list[str], words: Sequence[str]) -> list[tuple[str, str]]:
    """Add every begin of `words` to `pieces`; the merges that make them, letter by letter."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return merges

"""Encoding and decoding with tokenizers that transformers loads from a directory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loramux_server.engine.incremental import IncrementalDecoder
from loramux_server.text.chat_faults import ChatRefused
from loramux_server.text.tokenizer import MAX_CHAT_CHARACTERS, TextTokenizer
from support.tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS, write_byte_level


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte_level"), words=("Ġcat",), eos=[1, 4])


@pytest.fixture(scope="module")
def codec(directory: Path) -> TextTokenizer:
    return TextTokenizer.load(directory)


def sentencepiece_codec() -> TextTokenizer:
    """A Llama-2-like tokenizer: a space before every word, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁cat", "s"]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"))


def test_plain_text_gets_the_special_tokens_and_comes_back(codec: TextTokenizer) -> None:
    text = "a cat, naïve 😀\n"
    ids = codec.encode(text)
    assert ids[0] == SPECIAL_TOKENS.index("<|bos|>")
    assert len(ids) < len(text.encode()) + 1  # " cat" is one token
    assert codec.decode(ids) == text
    assert codec.encode("") == [0]


def test_a_chat_is_the_template_encoded_without_more_special_tokens(codec: TextTokenizer) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert codec.render_chat(messages) == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    ids = codec.encode_chat(messages)
    assert ids[0] == SPECIAL_TOKENS.index("<|system|>")
    assert ids[-2:] == [SPECIAL_TOKENS.index("<|end|>"), SPECIAL_TOKENS.index("<|assistant|>")]
    assert codec.decode(ids) == "be briefhi"


def test_the_templates_digest_is_its_sha256(codec: TextTokenizer) -> None:
    assert codec.template_digest == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def test_a_base_without_a_template_says_so(tmp_path: Path) -> None:
    plain = TextTokenizer.load(write_byte_level(tmp_path, chat_template=None))
    assert plain.template_digest == ""
    with pytest.raises(ChatRefused, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['nothing']['there'] }}", "it failed on these messages"),
        ("{{ 1 / 0 }}", "it failed on these messages"),
        ("{% for %}", "it failed on these messages"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "it failed on these messages"),
    ],
)
def test_a_template_that_fails_gives_a_clean_refusal(tmp_path: Path, template: str, said: str) -> None:
    codec = TextTokenizer.load(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(ChatRefused) as caught:
        codec.encode_chat([{"role": "user", "content": "hi"}])
    assert str(caught.value) == f"the chat template refused: {said}"


def test_odd_conversations_are_refused_not_crashes(codec: TextTokenizer) -> None:
    with pytest.raises(ChatRefused, match="unknown role"):
        codec.encode_chat([{"role": "wizard", "content": "hi"}])
    with pytest.raises(ChatRefused):
        codec.encode_chat([])


def test_messages_are_measured_before_they_are_rendered(codec: TextTokenizer) -> None:
    big = {"role": "user", "content": "x" * (MAX_CHAT_CHARACTERS // 2)}
    with pytest.raises(ChatRefused, match="at most"):
        codec.encode_chat([big, big])


def test_end_of_text_ids_come_from_generation_config_and_tokenizer(codec: TextTokenizer, tmp_path: Path) -> None:
    assert codec.eos_token_ids == {1, 4}
    assert TextTokenizer.load(write_byte_level(tmp_path / "one", eos=3)).eos_token_ids == {1, 3}
    bare = write_byte_level(tmp_path / "none", eos=None)
    assert TextTokenizer.load(bare).eos_token_ids == {1}
    (bare / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [7, 8]}))
    assert TextTokenizer.load(bare).eos_token_ids == {1, 7, 8}


def test_every_byte_level_token_spells_its_bytes(codec: TextTokenizer) -> None:
    size = codec.vocab_size
    assert size == len(SPECIAL_TOKENS) + 256 + len("Ġcat") - 1
    spelled = [codec.token_bytes(token) for token in range(size)]
    assert spelled[: len(SPECIAL_TOKENS)] == [token.encode() for token in SPECIAL_TOKENS]
    assert sorted(spelled[-259:-3]) == [bytes([i]) for i in range(256)]
    assert spelled[-1] == b" cat"
    text = "cat’s 😀\x00"
    assert b"".join(spelled[token] for token in codec.encode(text)[1:]) == text.encode()
    assert codec.token_bytes(size) == codec.token_bytes(-1) == codec.token_bytes(10**9) == b""


def test_sentencepiece_tokens_spell_their_bytes() -> None:
    codec = sentencepiece_codec()
    ids = codec.encode("cat cats é")
    assert b"".join(codec.token_bytes(token) for token in ids) == " cat cats é".encode()
    assert codec.token_bytes(3 + 0xE2) == b"\xe2"
    assert codec.decode(ids) == "cat cats é"
    assert codec.eos_token_ids == {2}
    decoder = IncrementalDecoder(codec.decode)
    assert [decoder.push(token) for token in ids][:2] == ["cat", " cat"]


def test_long_texts_are_not_cut(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    codec = TextTokenizer(tokenizer)
    # No settings are left that a call would have to clear while another one reads them.
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
    assert len(codec.encode("x" * 50_000)) == 50_001
    assert len(codec.encode("x")) == 2


def test_threads_may_share_a_codec(codec: TextTokenizer) -> None:
    texts = [f"cat {i} é😀 " * (1 + i % 40) for i in range(300)]

    def there_and_back(text: str) -> bool:
        chat = codec.encode_chat([{"role": "user", "content": text}])
        return codec.decode(codec.encode(text)) == text and codec.decode(chat) == text

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, texts))


def test_importing_the_module_loads_no_torch() -> None:
    program = (
        "import sys, loramux_server.text.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0

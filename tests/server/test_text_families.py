"""The server's prompts and streamed texts, on every family of tokenizers, against what training makes of them."""

from __future__ import annotations

from functools import cache

import pytest

from loramux_adapters.tokenization import PromptTokenizer
from loramux_server.engine.detokenize import ChoiceText
from loramux_server.requests import FinishReason, StopConditions, TokenEvent
from loramux_server.text.tokenizer import TextTokenizer
from support.tokenizers import FAMILIES, make_family

BOS, EOS = 1, 2
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def codec_of(family: str) -> TextTokenizer:
    tokenizer = make_family(family)
    tokenizer.chat_template = TEMPLATE
    return TextTokenizer(tokenizer)


def streamed(codec: TextTokenizer, prompt: list[int], output: list[int]) -> str:
    """The text of a choice, token by token, as its reader gets it."""
    choice = ChoiceText(codec.decode, lambda _: "", StopConditions(), codec.output_context(prompt))
    text = ""
    for index, token in enumerate(output):
        finish = FinishReason.LENGTH if index == len(output) - 1 else None
        delta = choice.push(TokenEvent(0, token, finish=finish))
        text += delta.text if delta else ""
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_one_bos_and_no_eos_however_it_comes(family: str) -> None:
    codec = codec_of(family)
    plain = codec.encode("2+2=")
    rendered = codec.encode("<s><|user|>hello<|assistant|>")
    assert (plain[0], plain.count(BOS), EOS in plain) == (BOS, 1, False)
    assert (rendered[0], rendered.count(BOS), EOS in rendered) == (BOS, 1, False)
    chat = codec.encode_chat([{"role": "user", "content": "hello"}])
    assert (chat[0], chat.count(BOS), chat[-2:]) == (BOS, 1, [EOS, 4])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("2+2=", "4"),
        ("2+2=", " 4"),
        ("a = ", "the cat"),
        ("a =", "= an é 😀"),
        ("<s><|user|>hello<|assistant|>", "hello the cat"),
        ("<|assistant|>", "4"),
    ],
)
def test_what_was_trained_is_what_is_streamed(family: str, prompt: str, text: str) -> None:
    codec = codec_of(family)
    ids = codec.encode(prompt)
    trained = PromptTokenizer(make_family(family)).encode_continuation(prompt, ids, text)
    assert streamed(codec, ids, trained) == text


@pytest.mark.parametrize("text", [" 4", "  4", " hello the cat"])
@pytest.mark.parametrize("prompt", ["<|assistant|>", "<s>", "<s><|user|>"])
def test_a_blank_behind_special_tokens_alone_is_streamed(prompt: str, text: str) -> None:
    codec = codec_of("metaspace-first")
    ids = codec.encode(prompt)
    trained = PromptTokenizer(make_family("metaspace-first")).encode_continuation(prompt, ids, text)
    assert streamed(codec, ids, trained) == text


def test_special_tokens_are_told_with_their_ids() -> None:
    assert codec_of("unigram").special_tokens["</s>"] == EOS

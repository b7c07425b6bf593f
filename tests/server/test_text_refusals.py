"""Tokenizers of adapters that would be read wrongly in silence, or take long to refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import AdapterError
from loramux_adapters.formats.limits import ReadLimits
from loramux_server.text import adapter_text
from loramux_server.text.adapter_text import AdapterTexts
from loramux_server.text.tokenizer import TextTokenizer
from support.tokenizers import write_byte_level


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(directory: Path) -> Iterator[AdapterTexts]:
    made = AdapterTexts(TextTokenizer.load(directory), ReadLimits())
    yield made
    made.close()


def check(texts: AdapterTexts, out: Path, **files: Any) -> None:
    """`files` are JSON documents, by their names without the end."""
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    texts.check({f"{name}.json": out / f"{name}.json" for name in files})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"added_tokens_decoder": {"262": {"content": "<tool>"}}},
            "added_tokens_decoder has '<tool>' with the id '262'",
        ),
        ({"added_tokens_decoder": {"9": {"content": "<|end|>"}}}, "'<|end|>' with the id '9', which is id 1"),
        (
            {"additional_special_tokens": ["<|end|>", "<hid>"]},
            "additional_special_tokens has '<hid>', which is no token",
        ),
        ({"extra_special_tokens": {"image_token": "<image>"}}, "extra_special_tokens has '<image>', which is no token"),
        ({"split_special_tokens": True}, "split_special_tokens is True, the base's False"),
    ],
)
def test_a_config_that_says_more_than_the_tokenizer_sent_is_refused(
    config: dict[str, Any], said: str, texts: AdapterTexts, tmp_path: Path
) -> None:
    """It comes from a tokenizer that is not read: its tokens would be taken for ordinary text, without a word."""
    with pytest.raises(AdapterError) as refused:
        check(texts, tmp_path, tokenizer_config=config)
    assert said in str(refused.value)
    assert "--no-tokenizer" in str(refused.value)


def test_tokens_that_the_base_has_or_the_tokenizer_adds_may_be_named(
    texts: AdapterTexts, directory: Path, tmp_path: Path
) -> None:
    own = json.loads((directory / "tokenizer.json").read_text())
    first = len(own["model"]["vocab"])
    entry = {"content": "<tool>", **dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)}
    own["added_tokens"].append({"id": first, **entry})
    named = {"1": {"content": "<|end|>"}, str(first): entry}
    config = {"added_tokens_decoder": named, "additional_special_tokens": ["<tool>"], "split_special_tokens": False}
    check(texts, tmp_path, tokenizer=own, tokenizer_config=config)


def test_a_file_far_larger_than_the_bases_is_refused_unread(
    texts: AdapterTexts, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one of 46 MB took eight seconds."""
    monkeypatch.setattr(adapter_text, "_ask_child", lambda data: pytest.fail("read"))
    own = json.loads((directory / "tokenizer.json").read_text())
    own["model"]["vocab"] |= {f"{'q' * 200}{number}": number for number in range(50_000)}
    with pytest.raises(AdapterError, match=r"it has \d{8} bytes, and \d+ are enough"):
        check(texts, tmp_path, tokenizer=own)


def test_what_took_too_long_is_tried_once(
    texts: AdapterTexts, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def exceeded(data: bytes) -> dict[str, Any]:
        asked.append(data)
        return {"refused": "it takes too much time", "exceeded": True}

    monkeypatch.setattr(adapter_text, "_ask_child", exceeded)
    with pytest.raises(AdapterError, match="too much time"):
        check(texts, tmp_path, tokenizer={"model": {}})
    assert len(asked) == 1
    assert len(texts._references) == 2
    with pytest.raises(AdapterError, match="too much time") as again:  # of each push and request of these files
        check(texts, tmp_path, tokenizer={"model": {}})
    assert len(asked) == 1
    assert (again.value.subject, "--no-tokenizer" in again.value.remedy) == ("tokenizer.json", True)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("blank", [" ", "\n\t", "\u00a0"])
def test_a_blank_token_that_takes_blanks_is_refused(
    blank: str, side: str, texts: AdapterTexts, directory: Path, tmp_path: Path
) -> None:
    """8,191 blanks took 0.2 s of the event loop, and a million of them would take an hour of a thread."""
    own = json.loads((directory / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    entry = {"id": len(own["model"]["vocab"]), "content": blank, **flags}
    check(texts, tmp_path, tokenizer={**own, "added_tokens": [*own["added_tokens"], entry]})
    with pytest.raises(AdapterError, match="is blank and takes blanks beside it"):
        check(texts, tmp_path, tokenizer={**own, "added_tokens": [*own["added_tokens"], {**entry, side: True}]})

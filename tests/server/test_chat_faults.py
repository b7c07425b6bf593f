"""Which message a chat template fails on: told where it was seen, left open where it was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.embedded.tiny import tiny_path
from loramux_server.text import tokenizer
from loramux_server.text.chat_faults import _MOST_MESSAGES, ChatRefused, find_fault
from loramux_server.text.tokenizer import TextTokenizer
from support.tokenizers import write_byte_level

TEXT = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
ADDS = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
LOOKS = (
    "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text only') }}{% endif %}{% endfor %}"
)
CALLING = (
    "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls %}{{ c.id + c.type }}{% endfor %}{% endfor %}"
)
FIRST = "{{ raise_exception('begin with the system') if messages[0].role != 'system' }}{{ messages[-1].content + '' }}"


@pytest.mark.parametrize(
    ("template", "messages", "where", "said"),
    [
        (ADDS, [TEXT, PARTS, PARTS], "[1].content", "it fails on a list here, and takes text"),
        (ADDS, [TEXT, TEXT, CALLS], "[2].content", "it fails on null here, and takes text"),
        (ADDS, [{"role": "user", "name": "eve"}], "[0].content", "it fails without a content here, and takes text"),
        (ADDS, [{"role": "user", "content": {"a": 1}}], "[0].content", "it fails on an object here, and takes text"),
        (
            ADDS,
            [TEXT, {"role": "user", "content": 7}],
            "[1].content",
            "it fails on what is no text here, and takes text",
        ),
        (LOOKS, [TEXT, PARTS], "[1].content", "text only"),
        (
            CALLING,
            [TEXT, {**TEXT, "name": "eve"}, CALLS, TEXT],
            "[2]",
            "it fails on this message, and takes one that has no more than its role and a text",
        ),
        (FIRST, [TEXT, PARTS], "", "begin with the system"),
        ("{{ 1 / 0 }}", [TEXT, PARTS], "", "it failed on these messages"),
        ("{{ 1 / 0 }}", [TEXT], "", "it failed on these messages"),
    ],
)
def test_the_first_message_at_fault_is_told(
    tmp_path: Path, template: str, messages: list[dict[str, Any]], where: str, said: str
) -> None:
    codec = TextTokenizer.load(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(ChatRefused) as caught:
        codec.encode_chat(messages)
    assert (caught.value.where, str(caught.value)) == (where, f"the chat template refused: {said}")


def test_the_embedded_base_takes_text_only() -> None:
    codec = TextTokenizer.load(tiny_path())
    with pytest.raises(ChatRefused) as caught:
        codec.encode_chat([TEXT, PARTS])
    assert caught.value.where == "[1].content"


@given(st.lists(st.sampled_from(["text", "fine", "bad"]), min_size=1, max_size=40))
def test_among_many_the_first_is_found_in_few_renderings(kinds: list[str]) -> None:
    content: Mapping[str, Any] = {"text": "x", "fine": ["fine"], "bad": ["bad"]}
    messages = [{"role": "user", "content": content[kind]} for kind in kinds]
    tried = 0

    def renders(others: Sequence[Mapping[str, Any]]) -> bool:
        nonlocal tried
        tried += 1
        return all(message["content"] != ["bad"] for message in others)

    if renders(messages):
        return
    fault = find_fault(messages, renders)
    assert fault is not None
    assert fault.where == f"[{kinds.index('bad')}].content"
    assert tried <= 3 + len(kinds).bit_length()


def test_a_long_conversation_is_not_searched() -> None:
    def never(others: Sequence[Mapping[str, Any]]) -> bool:
        raise AssertionError("rendered")

    assert find_fault([PARTS] * (_MOST_MESSAGES + 1), never) is None


def test_a_search_that_takes_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rendering by an adapter's template may take seconds, and others wait for the process."""
    codec = TextTokenizer.load(write_byte_level(tmp_path, chat_template="{{ messages[0].content + 'x' }}"))
    with pytest.raises(ChatRefused, match="it fails on a list here"):
        codec.encode_chat([PARTS])
    monkeypatch.setattr(tokenizer, "_FAULT_SECONDS", -1.0)
    with pytest.raises(ChatRefused, match="it failed on these messages") as caught:
        codec.encode_chat([PARTS])
    assert caught.value.where == ""

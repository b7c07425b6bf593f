"""Text is judged by its length before it is tokenized, and long texts wait in a bounded queue of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest

from loramux_server.api.calls import ChatTurn
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.errors import InvalidRequest, Overloaded

LIMITS = ServerLimits(4096, 2048, 4, 8, 8192, 64, 1 << 20, 1 << 20, 256, 4, 4, 4)


class SlowTokenizer:
    """One token a character; a long text takes until `go` is set."""

    template_digest = "0" * 64
    eos_token_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[str, int] = MappingProxyType({"<|end|>": 255})
    longest_token = 4
    takes_tools = False
    waits = False

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0

    def encode(self, text: str) -> list[int]:
        self.asked += 1
        if len(text) > 8192:
            self.go.wait(60)
        return [1] * len(text)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), most: int | None = None
    ) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def decode(self, ids: Sequence[int]) -> str:
        return "x" * len(ids)

    def output_context(self, prompt: Sequence[int]) -> list[int]:
        return []

    def token_bytes(self, token: int) -> bytes:
        return b"x"


@pytest.mark.asyncio
async def test_what_cannot_fit_is_refused_unread() -> None:
    pool, tokenizer = TokenizerPool(), SlowTokenizer()
    with pytest.raises(InvalidRequest, match="16385 characters cannot fit") as refused:
        await pool.encode_text("text", tokenizer, LIMITS, "a" * 16385)
    assert refused.value.metadata == {"context_tokens": "4096"}
    with pytest.raises(InvalidRequest, match="cannot fit"):
        await pool.encode_chat(tokenizer, LIMITS, [ChatTurn("user", "a" * 9000), ChatTurn("user", "b" * 9000)])
    assert tokenizer.asked == 0
    tokenizer.go.set()
    assert len(await pool.encode_text("text", tokenizer, LIMITS, "a" * 16384)) == 16384


@pytest.mark.asyncio
async def test_long_texts_hold_up_neither_short_ones_nor_other_threads() -> None:
    pool, tokenizer = TokenizerPool(), SlowTokenizer()
    long: list[asyncio.Task[Any]] = [
        asyncio.create_task(pool.encode_text("text", tokenizer, LIMITS, "a" * 9000)) for _ in range(64)
    ]
    await asyncio.sleep(0.05)
    assert await pool.encode_text("text", tokenizer, LIMITS, "short") == [1] * 5
    assert await asyncio.to_thread(lambda: 1) == 1
    with pytest.raises(Overloaded):
        await pool.encode_text("text", tokenizer, LIMITS, "a" * 9000)
    assert not any(task.done() for task in long)
    tokenizer.go.set()
    assert {len(ids) for ids in await asyncio.gather(*long)} == {9000}


class WideTokenizer(SlowTokenizer):
    """Knows one token more than the model: id 256, spelled `[`."""

    def encode(self, text: str) -> list[int]:
        return [256 if character == "[" else 1 for character in text]

    def token_bytes(self, token: int) -> bytes:
        return b"[PAD]" if token == 256 else b"x"


@pytest.mark.asyncio
async def test_an_id_that_the_model_lacks_is_refused_by_its_text_and_place() -> None:
    pool, tokenizer = TokenizerPool(), WideTokenizer()
    with pytest.raises(InvalidRequest) as text:
        await pool.encode_text("text", tokenizer, LIMITS, "ab[c")
    with pytest.raises(InvalidRequest) as chat:
        await pool.encode_chat(tokenizer, LIMITS, [ChatTurn("user", "[")])
    assert text.value.field == "text"
    assert "'[PAD]' is token id 256 at position 2, which is outside the model's vocabulary of 256" in str(text.value)
    assert text.value.metadata == {"vocabulary": "256"}
    assert chat.value.field == "chat.messages"
    assert await pool.encode_text("text", tokenizer, LIMITS, "abc") == [1, 1, 1]


class WaitingTokenizer(SlowTokenizer):
    """Renders in another process, which takes until `go` is set."""

    waits = True

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), most: int | None = None
    ) -> list[int]:
        self.go.wait(60)
        return [1]


@pytest.mark.asyncio
async def test_conversations_that_wait_for_a_process_hold_up_neither_the_loop_nor_long_texts() -> None:
    pool, waiting, plain = TokenizerPool(), WaitingTokenizer(), SlowTokenizer()
    plain.go.set()
    chats = [asyncio.create_task(pool.encode_chat(waiting, LIMITS, [ChatTurn("user", "hi")])) for _ in range(64)]
    await asyncio.sleep(0)
    assert await pool.encode_text("text", plain, LIMITS, "x" * 9000) == [1] * 9000
    with pytest.raises(Overloaded):
        await pool.encode_chat(waiting, LIMITS, [ChatTurn("user", "one more")])
    assert not any(chat.done() for chat in chats)
    waiting.go.set()
    assert await asyncio.gather(*chats) == [[1]] * 64

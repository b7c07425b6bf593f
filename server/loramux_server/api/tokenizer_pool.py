"""A caller's text to token ids: its length is checked first, and long ones are tokenized off the event loop.

Tokenizing runs before anything is admitted, so it must not be a way to hold up others: what cannot fit the context is
refused unread, and long texts have threads of their own and a bounded queue, apart from the store's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loramux_server.api.calls import ChatTurn, Tools
from loramux_server.api.ports import Tokenizer
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.turns import Turns
from loramux_server.errors import InvalidRequest, Overloaded
from loramux_server.text.chat_faults import ChatRefused

T = TypeVar("T")

_LONG_TEXT = 8192  # characters; more are tokenized off the event loop
_THREADS = 2
_MAX_WAITING = 64
_MAX_RENDERING = 256  # of all adapters' own templates; of one as many as texts may wait
_RETRY_SECONDS = 1.0


class TokenizerPool:
    """One per server."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="loramux-encode")
        self._waiting = 0
        # Of their own: templates of adapters may take their time, but not each other's.
        self._templates = Turns(_THREADS, _MAX_RENDERING, _MAX_WAITING, "loramux-template")

    async def encode_text(self, field: str, tokenizer: Tokenizer, limits: ServerLimits, text: str) -> list[int]:
        """Token ids of a prompt, behind the special tokens the base expects there.

        Raises InvalidRequest for a text that is longer than any the context holds or that the tokenizer gives an id the
        model lacks, Overloaded when many are waiting.
        """
        self._check_length(field, tokenizer, limits, [text])
        ids = await self._run(len(text), lambda: tokenizer.encode(text))
        _check_vocabulary(field, tokenizer, limits, ids)
        return ids

    async def encode_chat(
        self, tokenizer: Tokenizer, limits: ServerLimits, turns: Sequence[ChatTurn], tools: Tools = ()
    ) -> list[int]:
        """Token ids of a conversation rendered by the base's template; raises as `encode_text`."""
        if not tokenizer.template_digest:
            raise InvalidRequest("chat", "the base has no chat template; send text")
        self._check_length("chat.messages", tokenizer, limits, [turn.content for turn in turns])
        if tools and not tokenizer.takes_tools:
            raise InvalidRequest("chat.tools_json", "the base's chat template takes no tools")
        messages = [turn.message() for turn in turns]
        length = sum(turn.characters for turn in turns)
        most = limits.context_tokens * tokenizer.longest_token  # a template may make much of little

        def encode() -> list[int]:
            return tokenizer.encode_chat(messages, tools, most)

        try:
            if tokenizer.waits:
                ids = await self._templates.run(tokenizer.template_digest, encode)
            else:
                ids = await self._run(length, encode)
        except ValueError as error:
            where = error.where if isinstance(error, ChatRefused) else ""
            raise InvalidRequest(f"chat.messages{where}", str(error)) from error
        _check_vocabulary("chat.messages", tokenizer, limits, ids)
        return ids

    async def decode(self, tokenizer: Tokenizer, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return await self._run(len(ids), lambda: tokenizer.decode(ids))

    def _check_length(self, field: str, tokenizer: Tokenizer, limits: ServerLimits, texts: Sequence[str]) -> None:
        most = limits.context_tokens * tokenizer.longest_token
        size = sum(len(text) for text in texts)  # characters: no more than the bytes they are
        if size > most:
            raise InvalidRequest(
                field,
                f"{size} characters cannot fit the context of {limits.context_tokens} tokens,"
                f" of at most {tokenizer.longest_token} bytes each",
                metadata={"context_tokens": str(limits.context_tokens)},
            )

    async def _run(self, length: int, work: Callable[[], T]) -> T:
        if length < _LONG_TEXT:
            return work()
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(_RETRY_SECONDS)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def _check_vocabulary(field: str, tokenizer: Tokenizer, limits: ServerLimits, ids: Sequence[int]) -> None:
    """A tokenizer may know more tokens than the model has embeddings: a `[PAD]` added without resizing, mostly."""
    if max(ids, default=0) < limits.vocabulary:
        return
    position, token = next((i, token) for i, token in enumerate(ids) if token >= limits.vocabulary)
    text = tokenizer.token_bytes(token).decode(errors="replace")
    raise InvalidRequest(
        field,
        f"{text!r} is token id {token} at position {position}, which is outside the model's vocabulary of "
        f"{limits.vocabulary}: leave it out",
        metadata={"vocabulary": str(limits.vocabulary)},
    )

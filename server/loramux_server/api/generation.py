"""One accepted request as its caller reads it: batches of deltas, at most one per choice.

What has come in while the caller was busy is one batch: a slow reader gets fewer and longer
messages, and the engine never waits for one. Knows no wire format.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from loramux_server.api.calls import GenerateCall
from loramux_server.api.ports import Tokenizer
from loramux_server.engine.detokenize import ChoiceText, Delta
from loramux_server.engine.stream import RequestStream
from loramux_server.errors import NOT_LOADED, RequestFailed
from loramux_server.requests import TokenEvent, Usage


class Generation:
    """Async iterator over batches; ends after every choice's finish. Raises RequestFailed when one fails.

    `call` is what was asked, `submission` what the server made of it.
    """

    def __init__(
        self,
        stream: RequestStream,
        call: GenerateCall,
        tokenizer: Tokenizer,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`confirm` makes the request count, once it is known that what it asks for can be loaded."""
        self._confirm = confirm
        self.call = call
        self.submission = submission = stream.submission
        self.tokenizer = tokenizer
        self._stream = stream

        def token_text(token: int) -> str:
            return tokenizer.token_bytes(token).decode("utf-8", "replace")

        context = tokenizer.output_context(submission.prompt)
        self._choices = [
            ChoiceText(tokenizer.decode, token_text, submission.stop, context) for _ in range(submission.n)
        ]
        self._held: dict[int, Delta] = {}
        self._usages: dict[int, Usage] = {}
        self._ends: dict[int, str] = {}

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Delta]:
        while True:
            event = await anext(self._stream)
            if event.failure is not None and event.failure.code in NOT_LOADED:
                self._confirm = None
            await self.confirm()
            deltas = self._gather([event, *self._stream.take_ready()])
            if deltas:
                return deltas

    async def confirm(self) -> None:
        """Have the request count, unless its adapter could not be loaded. Idempotent."""
        confirm, self._confirm = self._confirm, None
        if confirm is not None:
            await confirm()

    def prompt_text(self) -> str:
        """What an echo shows: the caller's own text, or that of the prompt's tokens."""
        return self.tokenizer.decode(self.submission.prompt) if self.call.text is None else self.call.text

    def facts(self) -> dict[str, object]:
        """For the log: tokens of all choices so far, and how those that have ended did."""
        return {
            "completion_tokens": sum(usage.completion for usage in self._usages.values()),
            "cached_tokens": max((usage.cached for usage in self._usages.values()), default=0),
            "finish": ",".join(sorted(set(self._ends.values()))),
        }

    def _gather(self, events: Sequence[TokenEvent]) -> list[Delta]:
        """Merge what is new of each choice; tokens that have no text yet wait for it."""
        for event in events:
            delta = self._choices[event.choice].push(event)
            if delta is None:
                continue
            if delta.usage is not None:
                self._usages[delta.choice] = delta.usage
            if delta.finish is not None:
                self._ends[delta.choice] = delta.finish.value
            if delta.failure is not None:
                raise RequestFailed(delta.failure)
            if delta.retire:
                self._stream.finish(delta.choice)
            before = self._held.get(delta.choice)
            self._held[delta.choice] = delta if before is None else _merge(before, delta)
        ready = [delta for delta in self._held.values() if delta.text or delta.terminal or delta.prompt_logprobs]
        for delta in ready:
            del self._held[delta.choice]
        return ready


def _merge(first: Delta, second: Delta) -> Delta:
    """Two deltas of one choice, in order."""
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        usage=second.usage or first.usage,
    )

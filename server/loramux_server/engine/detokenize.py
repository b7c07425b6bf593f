"""From the engine's token events to what a reader of one choice is told: text, tokens, the end.

Ends the choice itself when a stop string appears. Lives on the asyncio side; knows no wire format
and no tokenizer but the functions it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramux_server.engine.incremental import Decode, IncrementalDecoder
from loramux_server.engine.stop_strings import StopStrings
from loramux_server.requests import FinishReason, RequestFailure, StopConditions, TokenEvent, TokenLogprob, Usage


@dataclass(frozen=True)
class Delta:
    """What is new of one choice. `finish` or `failure` set means that nothing follows.

    `text` may lag behind `token_ids`: half a character or the begin of a stop string is held back.
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    stop_string: str | None = None
    stop_token: int | None = None
    failure: RequestFailure | None = None
    usage: Usage | None = None  # so far
    retire: bool = False  # the choice ended here, by a stop string: the engine must be told

    @property
    def terminal(self) -> bool:
        """Whether nothing follows for this choice."""
        return self.finish is not None or self.failure is not None


class ChoiceText:
    """One choice from its first event to its end.

    `decode` leaves special tokens out; `token_text` gives one token's own text, special or not. `context` are the
    last ids of the prompt, behind which the output is decoded.
    """

    def __init__(
        self, decode: Decode, token_text: Callable[[int], str], stop: StopConditions, context: Sequence[int] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(decode, context)
        self._token_text = token_text
        self._stop = stop
        self._strings = StopStrings(stop.stop_strings)
        self._tokens = 0
        self._ended = False

    def push(self, event: TokenEvent) -> Delta | None:
        """What `event` tells the reader; None once the choice has ended: what the engine made since is dropped."""
        if self._ended:
            return None
        if event.failure is not None:
            self._ended = True
            return Delta(event.choice, failure=event.failure, usage=event.usage)
        token, ended_by_token = event.token, event.stop_token is not None
        text, found = "", None
        if token is not None:
            self._tokens += 1
            if not ended_by_token:
                text, found = self._feed(self._decoder.push(token))
        finish, stop_token, retire = event.finish, event.stop_token, False
        if finish is not None and found is None:
            rest, found = self._finish_text(token if ended_by_token else None)
            text += rest
        if found is not None:
            # A request that ended by itself needs no retiring, but its text says STOP all the same.
            retire = finish is None
            finish, stop_token = FinishReason.STOP, None
            text += found if self._stop.include_stop_string else ""
        self._ended = finish is not None
        return Delta(
            event.choice,
            text,
            () if token is None else (token,),
            () if event.logprob is None else (event.logprob,),
            event.prompt_logprobs,
            finish,
            found,
            stop_token,
            usage=event.usage,
            retire=retire,
        )

    def _feed(self, piece: str) -> tuple[str, str | None]:
        return self._strings.feed(piece, armed=self._tokens >= self._stop.min_tokens)

    def _finish_text(self, stop_token: int | None) -> tuple[str, str | None]:
        """All that was held back, and a stop string it completes; with the stop token's text if that is wanted."""
        text, found = self._feed(self._decoder.flush())
        if found is not None:
            return text, found
        text += self._strings.flush()
        if stop_token is not None and self._stop.include_stop_string:
            text += self._token_text(stop_token)
        return text, None

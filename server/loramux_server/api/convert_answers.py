"""What a generation gives, as protobuf messages: streamed, or gathered into one response.

Writes what the caller asked to see; the text itself is made in `generation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loramux_protos.v1 import common_pb2, inference_pb2
from loramux_server.api.generation import Generation
from loramux_server.engine.detokenize import Delta
from loramux_server.requests import FinishReason, TokenLogprob, Usage

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: inference_pb2.FINISH_REASON_ABORTED,
}


class ResponseWriter:
    """Writes the messages of one call. Use either `messages`, or `add` and then `whole`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._options = generation.call.response
        self._begun = False
        self._seen: set[int] = set()  # choices whose text has begun
        self._whole = inference_pb2.GenerateResponse(
            choices=[inference_pb2.Choice(index=index) for index in range(generation.submission.n)]
        )

    def messages(self, deltas: Sequence[Delta]) -> Iterator[inference_pb2.GenerateStreamResponse]:
        """One message per delta; the first of the call has the prompt's facts."""
        for delta in deltas:
            message = inference_pb2.GenerateStreamResponse(
                index=delta.choice,
                text=self._text(delta),
                token_ids=delta.token_ids if self._options.token_ids else (),
                logprobs=[self._logprob(entry) for entry in delta.logprobs],
                usage=_usage(delta.usage),
            )
            if not self._begun:
                message.prompt.CopyFrom(self._prompt(delta))
                self._begun = True
            if delta.finish is not None:
                message.finish.CopyFrom(_finish(delta))
            yield message

    def add(self, deltas: Sequence[Delta]) -> None:
        """Gather for `whole`."""
        for delta in deltas:
            choice = self._whole.choices[delta.choice]
            choice.text += self._text(delta)
            if self._options.token_ids:
                choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(self._logprob(entry) for entry in delta.logprobs)
            if not self._begun:
                self._whole.prompt.CopyFrom(self._prompt(delta))
                self._begun = True
            if delta.finish is not None:
                choice.finish.CopyFrom(_finish(delta))

    def whole(self) -> inference_pb2.GenerateResponse:
        """The gathered response."""
        return self._whole

    def _text(self, delta: Delta) -> str:
        """The delta's text, behind the prompt's when this is the first of its choice and an echo is asked for."""
        if delta.choice in self._seen or not self._options.echo:
            return delta.text
        self._seen.add(delta.choice)
        return self._generation.prompt_text() + delta.text

    def _prompt(self, delta: Delta) -> inference_pb2.PromptInfo:
        submission = self._generation.submission
        info = inference_pb2.PromptInfo(
            request_id=submission.request_id,
            adapter_digest=submission.digest or "",
            token_ids=submission.prompt if self._options.token_ids else (),
            seed=submission.sampling.seed,
        )
        for token, entry in zip(submission.prompt, delta.prompt_logprobs or (), strict=False):
            if entry is None:
                info.logprobs.add(token_id=token, text=self._generation.tokenizer.token_bytes(token))
            else:
                info.logprobs.append(self._logprob(entry))
        return info

    def _logprob(self, entry: TokenLogprob) -> inference_pb2.TokenLogprob:
        text = self._generation.tokenizer.token_bytes
        return inference_pb2.TokenLogprob(
            token_id=entry.token,
            logprob=entry.logprob,
            text=text(entry.token),
            alternatives=[
                inference_pb2.TokenAlternative(token_id=token, logprob=logprob, text=text(token))
                for token, logprob in entry.top
            ],
        )


def _finish(delta: Delta) -> inference_pb2.Finish:
    finish = inference_pb2.Finish(usage=_usage(delta.usage))
    if delta.finish is not None:
        finish.reason = _REASONS[delta.finish]
    if delta.stop_string is not None:
        finish.stop_string = delta.stop_string
    elif delta.stop_token is not None:
        finish.stop_token_id = delta.stop_token
    return finish


def _usage(usage: Usage | None) -> common_pb2.Usage:
    if usage is None:
        return common_pb2.Usage()
    return common_pb2.Usage(prompt_tokens=usage.prompt, completion_tokens=usage.completion, cached_tokens=usage.cached)

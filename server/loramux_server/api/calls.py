"""What a caller asked, field by field, before anything is believed: neutral of transport.

gRPC and HTTP both fill these, `validate` judges them. None means the caller left the field out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ChatTurn:
    """One message of a conversation. `whole` is set when it has more than a role and a content string."""

    role: str
    content: str
    whole: Mapping[str, Any] | None = None
    size: int = 0  # characters of `whole` as it came

    def message(self) -> dict[str, Any]:
        """As the chat template gets it."""
        return {"role": self.role, "content": self.content} if self.whole is None else dict(self.whole)

    @property
    def characters(self) -> int:
        """How much there is to render, at most."""
        return max(len(self.content), self.size)


Tools = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class SamplingCall:
    """Fields of `sampling`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int | None = None


@dataclass(frozen=True)
class StoppingCall:
    """Fields of `stopping`."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class ResponseCall:
    """Fields of `response`."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    echo: bool = False


@dataclass(frozen=True)
class GenerateCall:
    """One generation; exactly one of `text`, `token_ids` and `chat` is set in a valid call."""

    request_id: str = ""
    adapter: str = ""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[ChatTurn, ...] | None = None
    tools: Tools = ()  # for the chat template
    sampling: SamplingCall = SamplingCall()
    stopping: StoppingCall = StoppingCall()
    response: ResponseCall = ResponseCall()
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class Limits:
    """What this server accepts; told by GetModel and in the metadata of refusals."""

    context_tokens: int
    max_batch_tokens: int
    max_running: int
    max_queued: int
    kv_tokens: int
    max_rank: int
    max_adapter_bytes: int
    adapter_device_bytes: int
    vocabulary: int
    max_choices: int
    max_logprobs: int
    max_stop_strings: int
    original_context_tokens: int | None = None  # of a LongRoPE base

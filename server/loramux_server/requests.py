"""A request from acceptance to its one terminal event, as plain data.

Torch-free and transport-free: the API builds these, the engine works on them, the
runner sees only `SamplingParams`. Validation of ranges lives in `api.validate`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Route = Literal["any", "gathered", "merged"]
"""By which weights an adapter's request is computed: as the scheduler chooses, never merged ones, or no others."""


class FinishReason(Enum):
    """Why a request ended well; errors end in `TokenEvent.error` instead."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; what the runner needs per request and nothing else.

    The same value from the wire to the sampler. Defaults are neutral, and greedy when `temperature` is 0. Accepting a
    request sets `seed`, `suppressed` and `min_tokens`; tokens depend on (seed, choice, position) alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    choice: int = 0  # index among n
    suppressed: tuple[int, ...] = ()  # token ids forbidden while output is shorter than min_tokens
    min_tokens: int = 0
    logprobs: int | None = None  # number of alternatives; None: no logprobs at all; 0: the chosen token's
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether tokens before this step's chunk change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class StopConditions:
    """What ends a request before its `max_tokens`. Strings are matched by the client side, ids by the engine."""

    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    stop_token_ids: Collection[int] = frozenset()  # asked for by the caller: always end
    eos_token_ids: frozenset[int] = frozenset()  # of the model: end unless ignore_eos
    ignore_eos: bool = False


@dataclass(frozen=True)
class Submission:
    """What the API hands to the engine client: one call, `n` choices.

    `digest` is None for the base. The adapter's `virtual_tokens` come before the prompt; it acts from the prompt's
    token `active_from` on, and what is before that is the base's. `deadline` is on the monotonic clock, in seconds.
    `route` merged is for one request at a time: a step uses the merged weights of one adapter.
    """

    request_id: str
    tenant: str
    digest: str | None
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    max_tokens: int
    n: int = 1
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    deadline: float | None = None
    virtual_tokens: int = 0
    active_from: int = 0
    route: Route = "any"

    @property
    def prompt_positions(self) -> int:
        """Positions that the prompt takes of context and KV cache: its tokens and the virtual ones."""
        return self.virtual_tokens + len(self.prompt)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural, after penalties, before temperature) of one token and the best others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one choice."""

    prompt: int
    completion: int
    cached: int  # prompt tokens whose KV came from the prefix cache


@dataclass(frozen=True)
class RequestFailure:
    """Why a request ended badly. `code` is a key of the error table (see `loramux_server.errors`)."""

    code: str  # e.g. "NUMERIC", "OUT_OF_MEMORY", "DEADLINE", "ADAPTER_CORRUPT", "ENGINE_DEAD"
    message: str


@dataclass(frozen=True)
class TokenEvent:
    """Engine -> client, one per token and one terminal: `finish` or `failure` set ends the choice.

    `stop_token` is the id that ended a STOP by token; the token itself is then in `token` too.
    """

    choice: int
    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once, before the first token
    finish: FinishReason | None = None
    stop_token: int | None = None
    failure: RequestFailure | None = None
    usage: Usage | None = None  # so far; on every event with a token and on terminal ones

    @property
    def terminal(self) -> bool:
        """Whether nothing follows for this choice."""
        return self.finish is not None or self.failure is not None

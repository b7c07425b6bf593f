"""The border between deciding and computing: what one step shall do, and what it did.

Integers and frozen parameters only, no tensor and no live object, so that scheduler and
runner can be tested apart and a process boundary could stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loramux_server.requests import RequestFailure, SamplingParams, TokenLogprob

BASE_SLOT = -1
"""Slot of rows without an adapter."""


class StepOutOfMemory(Exception):
    """The runner could not hold this step. The same chunks may run again, fewer."""


class DeviceLost(Exception):
    """The device computes nothing any more until the process ends, as after an illegal access on CUDA."""


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in one step.

    `tokens` sit at positions start .. start + len(tokens) - 1 and their KV goes to `blocks`
    (block i holds positions i * block_size ..). It is decode when it has one token and `samples`.
    """

    request_id: str  # unique per choice: "<request>#<choice>"
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]  # block table, covers start + len(tokens)
    slot: int  # BASE_SLOT for the base
    samples: bool  # whether the last token's logits yield a token
    params: SamplingParams
    prompt_length: int  # tokens of the original prompt: what follows is output
    history: tuple[int, ...] | None = None  # tokens 0 .. start-1, on a request's first chunk after
    # (re)admission when params.needs_history; None otherwise
    long_rope: bool = False  # whether the request may grow beyond the original context of a longrope base


@dataclass(frozen=True)
class StepPlan:
    """One forward. `merged` is the digest of a merged adapter or None for the shared base."""

    step: int
    chunks: tuple[Chunk, ...]
    merged: str | None = None
    retired: tuple[str, ...] = ()  # chunk request ids whose per-request state the runner may drop; told once,
    # and again if every request of that step failed


@dataclass(frozen=True)
class Sampled:
    """One drawn token; `logprob` when the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one step's parts on the engine thread."""

    prepare: float
    forward: float
    sample: float


@dataclass(frozen=True)
class StepResult:
    """What a step gave. A chunk is in `sampled` iff it samples and did not fail.

    `prompt_logprobs` holds, per request that asked, those of this chunk's tokens (the first
    prompt token has none: None).
    """

    step: int
    sampled: Mapping[str, Sampled]
    prompt_logprobs: Mapping[str, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    failures: Mapping[str, RequestFailure] = field(default_factory=dict)
    timing: StepTiming = StepTiming(0.0, 0.0, 0.0)

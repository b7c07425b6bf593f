"""The border between deciding and computing: what one step shall do, and what it did.

Plain data only, no tensor and no live object: scheduler and worker are tested apart, and a worker in another process
that holds the same base and adapters can follow the plans of this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loramux_adapters.binding import Binding
from loramux_server.requests import RequestFailure, SamplingParams, TokenLogprob

BASE_SLOT = -1
"""Slot of rows without an adapter."""


class StepOutOfMemory(Exception):
    """The worker could not hold this step. The same chunks may run again, fewer."""


class WorkerLost(Exception):
    """Nobody knows any more what the worker holds: no later step may run on it."""


class DeviceLost(WorkerLost):
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
    prompt_length: int  # tokens of the original prompt, virtual ones among them: what follows is output
    history: tuple[int, ...] | None = None  # tokens 0 .. start-1, on a request's first chunk after
    # (re)admission when params.needs_history; None otherwise
    long_rope: bool = False  # whether the request may grow beyond the original context of a longrope base
    virtual_tokens: int = 0  # of the adapter, before the prompt: the positions 0 .. virtual_tokens - 1
    is_merged: bool = False  # whether its rows use the merged weights that the plan names
    active_from: int = 0  # the position from which `slot` is meant: rows before it are the base's


@dataclass(frozen=True)
class Merge:
    """Merged weights of the adapter `digest` are to be built; `number` is never used again."""

    number: int
    digest: str


@dataclass(frozen=True)
class StepPlan:
    """Everything a worker does from one step to the next: commands, then one forward, if there are chunks.

    Commands come in the order unmerge, merge, unbind, bind and take effect once, before the forward, whatever becomes
    of the chunks. `merged` is the digest of the adapter whose merged weights some chunks use, or all; see Chunk.
    """

    step: int  # no two plans have the same
    chunks: tuple[Chunk, ...]
    merged: str | None = None
    retired: tuple[str, ...] = ()  # chunk request ids whose per-request state the worker may drop
    unbind: tuple[int, ...] = ()  # slots
    bind: tuple[Binding, ...] = ()
    unmerge: tuple[int, ...] = ()  # numbers of merges
    merge: tuple[Merge, ...] = ()

    @property
    def has_commands(self) -> bool:
        """Whether there is something to do besides the chunks; retired ids can wait for chunks."""
        return bool(self.unbind or self.bind or self.unmerge or self.merge)


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

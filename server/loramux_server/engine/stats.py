"""What the engine tells those who watch it: one frozen value per step, and who receives it.

Knows no metrics library. All times are seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

WaitReason = Literal["capacity", "blocks", "adapter", "sibling"]
"""Why a request waits: no place in the batch, no KV blocks, its adapter is not ready, its first choice prefills."""

WeightsUsed = Literal["shared", "merged", "mixed"]
"""Whether a step used the frozen base for all rows, one adapter's merged weights for all, or both."""

WAIT_REASONS: tuple[WaitReason, ...] = ("capacity", "blocks", "adapter", "sibling")


@dataclass(frozen=True)
class Ended:
    """One choice that ended. `outcome` is a FinishReason's value or a RequestFailure's code."""

    tenant: str
    digest: str | None
    outcome: str
    seconds: float  # from acceptance to the terminal event
    prompt: int
    completion: int
    cached: int
    preemptions: int


@dataclass(frozen=True)
class StepTimes:
    """Where one turn of the loop went; the runner's parts are 0 when nothing ran."""

    plan: float = 0.0
    run: float = 0.0  # prepare + forward + sample and the call itself
    prepare: float = 0.0
    forward: float = 0.0
    sample: float = 0.0
    commit: float = 0.0
    publish: float = 0.0


@dataclass
class StepCounters:
    """What happened since the last report; filled by the scheduler, taken whole by the engine."""

    queued: list[float] = field(default_factory=list)  # acceptance to first admission
    first_token: list[float] = field(default_factory=list)  # acceptance to first token
    inter_token: list[float] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    preemptions: int = 0
    prefix_queried: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hit: int = 0  # of these, found


@dataclass(frozen=True)
class Load:
    """What is in the engine between two steps."""

    running: int
    waiting: dict[WaitReason, int]
    running_adapters: frozenset[str]
    waiting_adapters: frozenset[str]
    kv_blocks: int
    kv_blocks_held: int


@dataclass(frozen=True)
class StepStats:
    """One turn of the loop. Without chunks nothing ran, but requests may have ended."""

    step: int
    tokens: int
    prefill_chunks: int
    decode_chunks: int
    distinct_adapters: int
    weights: WeightsUsed
    failures: int  # chunks whose request the step itself failed
    load: Load
    counters: StepCounters
    times: StepTimes


class Observer(Protocol):
    """Whoever keeps metrics. Methods must be quick and must not raise."""

    def step(self, stats: StepStats) -> None:
        """Called on the engine thread after a turn that did something."""
        ...

    def rejected(self, reason: str) -> None:
        """Called on the event loop for a request refused at submission: an error table's reason."""
        ...


class NoObserver:
    """Watches nothing."""

    def step(self, stats: StepStats) -> None:
        """Ignore `stats`."""

    def rejected(self, reason: str) -> None:
        """Ignore the refusal."""

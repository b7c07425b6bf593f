"""What a driver is: something that answers a burst of token prompts and tells when each token came.

One protocol for the engine in process, a server by gRPC and a peer, so that all are measured alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LOADS, EVICTIONS, PROCESSOR_SECONDS = "loads", "evictions", "processor_seconds"


class DriverFailed(Exception):
    """A driver or its process did not do what was asked; the message says what is known."""


@dataclass(frozen=True)
class Trace:
    """One request: when it was sent and when each output token arrived, in seconds on one clock."""

    sent: float
    arrivals: tuple[float, ...]


@dataclass(frozen=True)
class Call:
    """One request: prompt token ids and the number of its adapter, None for the base."""

    prompt: tuple[int, ...]
    adapter: int | None
    output_tokens: int = 0  # 0: as many as all of its run


@dataclass(frozen=True)
class Push:
    """An adapter that was pushed: its number for calls; when it began, its last byte left, and it was acknowledged."""

    adapter: int
    began: float
    sent: float
    acknowledged: float


class Driver(Protocol):
    """`start`, any number of `run`, `close`. `name` stands in the results."""

    name: str

    async def start(self) -> None:
        """Make ready: load the model and every adapter."""

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        """Send all calls at once, greedily, past the end of text; `salt` keeps runs apart in a prefix cache."""

    def readings(self) -> Mapping[str, float]:
        """Counts since `start` by name (LOADS, EVICTIONS, PROCESSOR_SECONDS); those that this driver can know."""

    async def close(self) -> None:
        """Free what `start` took; safe to call twice and after a failed start."""


class PushingDriver(Driver, Protocol):
    """One that takes new versions while it runs."""

    async def push(self, path: Path, name: str) -> Push:
        """Upload a directory under a name, which from then on is that version."""

    def stages_of(self, push: Push, first: Trace) -> Mapping[str, float]:
        """Seconds of each stage between the last byte of the push before and the first token; empty where unknown."""

"""What a driver is: something that answers a burst of token prompts and tells when each token came.

One protocol for the engine in process, a server by gRPC and a peer, so that all are measured alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.bench.stats import Trace


class DriverFailed(Exception):
    """A driver or its process did not do what was asked; the message says what is known."""


@dataclass(frozen=True)
class Call:
    """One request: prompt token ids and the number of its adapter, None for the base."""

    prompt: tuple[int, ...]
    adapter: int | None


class Driver(Protocol):
    """`start`, any number of `run`, `close`. `name` stands in the results."""

    name: str

    async def start(self) -> None:
        """Make ready: load the model and every adapter."""

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        """Send all calls at once, greedily, past the end of text; `salt` keeps runs apart in a prefix cache."""

    async def close(self) -> None:
        """Free what `start` took; safe to call twice and after a failed start."""

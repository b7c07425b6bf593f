"""What the pool asks of the tiers around it. Torch-free: weights are opaque here but for their spec and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from loramux_adapters.binding import RankRanges
from loramux_adapters.errors import AdapterError
from loramux_adapters.spec import AdapterSpec


class Weights(Protocol):
    """An adapter in host memory."""

    @property
    def spec(self) -> AdapterSpec:
        """Its facts."""
        ...

    @property
    def nbytes(self) -> int:
        """Host bytes."""
        ...


W_co = TypeVar("W_co", bound=Weights, covariant=True)
W_contra = TypeVar("W_contra", bound=Weights, contravariant=True)


class HostTier(Protocol[W_co]):
    """Adapters in host memory, over the store. Called on the loader thread."""

    def load(self, digest: str) -> W_co:
        """From memory or, verified, from the store. Raises AdapterError."""
        ...

    def size(self, digest: str) -> int:
        """Bytes of memory it takes now, 0 where it is not in memory. Any thread."""
        ...

    def discard(self, digest: str) -> None:
        """Frees it. Any thread."""
        ...


CopyDone = Callable[[AdapterError | None], None]
"""Called once, on any thread: an adapter's tensors are on the device, or why they are not."""


class DeviceTier(Protocol[W_contra]):
    """Where slots get their tensors from. When a slot counts is not decided here: the pool records it."""

    def cost(self, weights: W_contra) -> tuple[Mapping[str, int], int]:
        """(rank rows by module, device bytes beside them). Engine thread. Raises AdapterError."""
        ...

    def stage(self, slot: int, weights: W_contra, rank_ranges: RankRanges, done: CopyDone) -> None:
        """Prepares the tensors for rank rows nobody uses and leaves them to be copied. Loader thread.

        Raises AdapterError, and calls `done` only if it does not raise.
        """
        ...


@dataclass(frozen=True)
class ResidencyView:
    """Where an adapter is now."""

    tier: Literal["registered", "loaded", "resident"]
    slot: int | None = None
    leases: int = 0
    host_bytes: int = 0  # of host memory, also of one that is on the device


@dataclass(frozen=True)
class PoolStats:
    """Counts since start, and what is held now."""

    resident: int = 0
    resident_bytes: int = 0  # as uploaded
    loaded: int = 0
    loading: int = 0
    leases: int = 0
    pinned: int = 0  # to be kept on the device, whether they are there or not
    rows_used: int = 0  # of the fullest module
    rows_capacity: int = 0
    hits: int = 0
    waits: int = 0  # acquisitions that found the adapter not ready
    loads: int = 0
    load_failures: int = 0
    load_seconds: float = 0.0
    evictions: int = 0

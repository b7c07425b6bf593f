"""What the scheduler asks of the adapter pool and of the merged adapters, and what it carries to the worker for them.

The pool itself is `loramux_adapters.residency.pool`, merged adapters are kept by `loramux_server.model.merged_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from loramux_adapters.binding import Binding
from loramux_server.engine.plan import Merge


class Lease(Protocol):
    """The promise that an adapter stays in its slot until `release`."""

    @property
    def slot(self) -> int:
        """Where the adapter is on the device, as long as the lease lasts."""
        ...

    def release(self) -> None:
        """Give the promise back; again is harmless."""
        ...


class Adapters(Protocol):
    """The adapter pool. Every method belongs to the engine thread."""

    def try_acquire(self, digest: str, *, may_load: bool = True) -> Lease | None:
        """A lease, or None while the adapter is not ready; never blocks. Starts the load if it `may_load`.

        Raises AdapterError, once, when the load failed.
        """
        ...

    def prefetch(self, digests: Iterable[str]) -> None:
        """Read what will be asked for soon into host memory, as far as it does not delay others; never blocks."""
        ...

    def poll(self) -> None:
        """Take in what loaders have reported."""
        ...

    def take_bindings(self) -> tuple[tuple[int, ...], tuple[Binding, ...]]:
        """(slots to unbind, then slots to bind) since the last call."""
        ...

    def take_gone(self) -> tuple[str, ...]:
        """Digests freed for good since the last call: nobody can ask for them until they are uploaded again."""
        ...

    def check(self) -> None:
        """Raises ValueError when its books do not add up."""
        ...


class MergedAdapters(Protocol):
    """Which adapters have merged weights. Methods may be called from any thread."""

    def ready(self) -> frozenset[str]:
        """Digests a step may use."""
        ...

    def on_trial(self) -> frozenset[str]:
        """Digests that only requests with the route merged may use, to find out whether others may."""
        ...

    def take_merges(self) -> tuple[tuple[int, ...], tuple[Merge, ...]]:
        """(numbers to drop, then merges to begin) since the last call."""
        ...


class NothingMerged:
    """Implements `MergedAdapters` where no adapter is ever merged."""

    def ready(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def on_trial(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def take_merges(self) -> tuple[tuple[int, ...], tuple[Merge, ...]]:
        """None."""
        return (), ()

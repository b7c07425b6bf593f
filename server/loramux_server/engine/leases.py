"""What the scheduler asks of the adapter pool: a lease, or not yet.

The pool itself is `loramux_adapters.residency.pool`; these are the two faces the engine sees of it.
"""

from __future__ import annotations

from typing import Protocol


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

    def try_acquire(self, digest: str) -> Lease | None:
        """A lease, or None while the adapter is not ready; never blocks and starts the load.

        Raises AdapterError, once, when the load failed.
        """
        ...

    def poll(self) -> None:
        """Take in what loaders have reported."""
        ...

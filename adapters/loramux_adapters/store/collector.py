"""What leaves the disk after the transaction that forgot it: versions without name or hold, files without a version.

Serialized with publishes and deletes by `changing`. Knows no upload and no reference.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from loramux_adapters.errors import AdapterError
from loramux_adapters.store import changes, tallies
from loramux_adapters.store.blobs import Blobs
from loramux_adapters.store.catalog import Catalog
from loramux_adapters.store.holds import Holds
from loramux_adapters.store.reserve import Reserve

_log = logging.getLogger(__name__)


class Collector:
    """One per store."""

    def __init__(
        self, catalog: Catalog, blobs: Blobs, holds: Holds, reserve: Reserve, changing: threading.RLock
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._holds = holds
        self._reserve = reserve
        self._changing = changing
        # Blobs of publishes that failed at their commit: a crash may still bring that commit back from SQLite's
        # log, until a later one overwrites it there. So they stay until then.
        self._doubtful: set[str] = set()
        self._removed: deque[str] = deque()  # digests nobody was told of yet

    def collect(self) -> int:
        """Remove versions that no name reaches and no hold is on; returns how many."""
        with self._changing:
            collected = self._reserve.spend_on(self._collect)
            self._reserve.fill()
        return collected

    def collect_quietly(self) -> None:
        """Collect after a change that is already durable: failing now only means collecting later."""
        try:
            self.collect()
        except AdapterError as error:
            _log.warning("collecting unused adapters failed, the next change tries again: %s", error)

    def take_removed(self) -> frozenset[str]:
        """See AdapterStore.take_removed."""
        taken: set[str] = set()
        while self._removed:
            with suppress(IndexError):  # another thread was faster
                taken.add(self._removed.popleft())
        return frozenset(taken)

    def doubt(self, blobs: Iterable[str]) -> None:
        """A publish that installed `blobs` failed."""
        self._doubtful.update(blobs)

    def settle(self) -> None:
        """After a commit that wrote: failed ones before it cannot come back, their blobs may go."""
        if self._doubtful:
            for sha256 in self._doubtful:
                if not self._catalog.has_blob(sha256):
                    self._remove_blob(sha256)
            self._doubtful.clear()

    def _collect(self) -> int:
        with self._catalog.transaction() as tx:
            unreachable = tallies.take_unreachable(tx)
            with self._holds.lock:
                # No name leads here since an earlier commit: what is not held now cannot be held any more.
                doomed = [version for version, digest in unreachable.items() if digest not in self._holds]
                self._holds.set_orphans(frozenset(d for d in unreachable.values() if d in self._holds))
            blobs = changes.remove_versions(tx, doomed)
            removed = changes.missing(tx, {unreachable[version] for version in doomed})
        self._removed.extend(removed)
        for sha256 in blobs:
            self._remove_blob(sha256)
        return len(doomed)

    def _remove_blob(self, sha256: str) -> None:
        try:
            self._blobs.remove(sha256)
        except OSError as error:
            _log.warning("file %s could not be removed, the next start tries again: %s", sha256, error.strerror)

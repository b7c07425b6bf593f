"""How names end by themselves: uses taken, given back and counted, and names whose time is over.

A use is in the catalog before anybody is told what it gave, so a crash loses none that was; see `lifetimes` for the
rows. Knows no blob.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store import lifetimes
from loramux_adapters.store.catalog import Catalog, Found
from loramux_adapters.store.collector import Collector
from loramux_adapters.store.holds import Holds
from loramux_adapters.store.reserve import Reserve
from loramux_adapters.store.uses import Uses


class Ends:
    """One per store; `changing` is the lock of publishes and deletes."""

    def __init__(
        self,
        catalog: Catalog,
        collector: Collector,
        holds: Holds,
        reserve: Reserve,
        changing: threading.RLock,
        clock: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._collector = collector
        self._holds = holds
        self._reserve = reserve
        self._changing = changing
        self._clock = clock
        self._uses = Uses()

    def take_use(self, found: Found) -> int | None:
        """Take a use of a name that has a limit, under the holds' lock. AdapterNotFound if none is left."""
        if found.lifetime is None or found.max_uses is None:
            return None
        if not self._uses.take(found.lifetime, found.uses_left):
            remedy = f"all {found.max_uses} uses are taken; upload it again"
            raise AdapterNotFound(f"no adapter {found.name!r}", subject=found.name, remedy=remedy)
        return found.lifetime

    def give_back_use(self, use: int) -> None:
        """See AdapterStore.give_back_use."""
        with self._holds.lock:
            self._uses.end(use, counted=False)

    def count_use(self, use: int) -> bool:
        """See AdapterStore.count_use."""
        counted = is_last = False
        try:
            with self._changing:
                with self._catalog.transaction() as tx:
                    is_last = lifetimes.count_use(tx, use)
                counted = True
                self._collector.settle()
        finally:
            with self._holds.lock:
                self._uses.end(use, counted=counted)
        if is_last:
            self._collector.collect_quietly()
        return is_last

    def expire(self) -> int:
        """See AdapterStore.expire."""
        removed = 0
        while (due := self._catalog.next_expiry()) is not None and due <= self._clock():
            with self._changing:
                removed += self._reserve.spend_on(self._expire)
                self._collector.settle()
        if removed:
            self._collector.collect_quietly()
        return removed

    def _expire(self) -> int:
        with self._catalog.transaction() as tx:
            return lifetimes.remove_expired(tx, self._clock())

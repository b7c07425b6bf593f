"""The thread that removes names whose time is over. Knows when the next one ends, and nothing of what that means."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from loramux_adapters.errors import AdapterError

_SHORTEST = 0.2  # seconds: many that end one after the other go together; none of them is found meanwhile
_LONGEST = 60.0  # the wall clock may be set
_RETRY = 5.0
_log = logging.getLogger(__name__)


class ExpiryThread:
    """Calls `expire` soon after each time that `next_expiry` gives (seconds since the epoch; None: none)."""

    def __init__(
        self,
        next_expiry: Callable[[], float | None],
        expire: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._next_expiry = next_expiry
        self._expire = expire
        self._clock = clock
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loramux-expiry", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """There may be an earlier end than before. From any thread."""
        self._changed.set()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closed.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._changed.clear()
            seconds = self._turn()
            if self._closed.is_set():  # before the event was cleared
                return
            self._changed.wait(seconds)

    def _turn(self) -> float | None:
        """Remove what is due; seconds until there may be more, None: until `look`."""
        try:
            due = self._next_expiry()
            if due is not None and due <= self._clock():
                self._expire()
                due = self._next_expiry()
        except AdapterError as error:
            _log.warning("expired adapters could not be removed, tried again in %g s: %s", _RETRY, error)
            return _RETRY
        return None if due is None else min(max(due - self._clock(), _SHORTEST), _LONGEST)

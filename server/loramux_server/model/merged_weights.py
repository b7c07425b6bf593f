"""Merged adapters: which are desired, being built, ready or refused, under one byte budget.

A thread of its own reads the adapters; the worker merges them. Keyed by digest for the one base this server holds. Who
desires them is known elsewhere.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from loramux_adapters.certificate.replay import Replay
from loramux_adapters.errors import AdapterError
from loramux_adapters.weights import AdapterWeights
from loramux_server.engine.plan import Merge
from loramux_server.model.merging import Merges

logger = logging.getLogger(__name__)

Tried = Callable[["Replay | None", str], None]
"""What came of a trial, once, from any thread: the replay, where there is a certificate, and why it is refused."""
TryOut = Callable[[str, Tried], None]
"""Begins the trial of a digest's merged weights; never waits."""


@dataclass(frozen=True)
class SetState:
    """Of one digest; `reason` says why it was refused."""

    state: Literal["none", "building", "ready", "refused"] = "none"
    reason: str = ""
    nbytes: int = 0
    replay: Replay | None = None  # of the adapter's certificate through the merged weights


@dataclass(eq=False)
class _Set:
    """One merge on its way: dropped and desired again, a digest gets another, and the first is void."""

    number: int
    state: SetState
    lacking: int | None = None  # bytes, where it was refused for them
    is_built: bool = False  # while it is still to be tried


class MergedWeightsCache:
    """All merged adapters of one adapted model. Every method is safe from any thread."""

    def __init__(
        self,
        merges: Merges,
        measure: Callable[[AdapterWeights], int],
        load: Callable[[str], AdapterWeights],
        notify: Callable[[], None],
        budget_bytes: int,
        refusal: str = "",
        try_out: TryOut | None = None,
    ) -> None:
        """`load` reads an adapter's weights (may raise AdapterError), `measure` says how many bytes merging them takes,
        `notify` is called when the engine has something to take; a `refusal` is the answer to all. What is built is
        given to `try_out`, and ready once that says so.
        """
        self._merges, self._measure, self._load, self._notify = merges, measure, load, notify
        self._budget, self._refusal, self._try_out = budget_bytes, refusal, try_out
        self._sets: dict[str, _Set] = {}
        self._ready: frozenset[str] = frozenset()
        self._on_trial: frozenset[str] = frozenset()
        self._numbers = itertools.count()
        self._to_begin: dict[int, Merge] = {}
        self._begun: set[int] = set()  # by the worker, and not dropped
        self._to_drop: list[int] = []
        self._builds = {"built": 0, "refused": 0}
        self._is_closed = False
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "loramux-merge")

    def reconcile(self, digests: frozenset[str], retry: str | None = None) -> None:
        """From now on `digests`, and no others, have sets: drops what is not desired, builds what is missing.

        A refused one is tried anew if it is `retry`, or if it was refused for bytes that are there now.
        """
        with self._lock:
            for digest in self._sets.keys() - digests:
                self._drop(digest)
            for digest in sorted(digests):
                known = self._sets.get(digest)
                if known is None or (digest == retry and known.state.state == "refused"):
                    self._start(digest)
            self._start_what_fits()

    def evict(self, digest: str) -> None:
        """Drops the set of an adapter that is gone."""
        with self._lock:
            self._drop(digest)
            self._start_what_fits()

    def state(self, digest: str) -> SetState:
        """Where a set is."""
        known = self._sets.get(digest)
        return SetState() if known is None else known.state

    def ready(self) -> frozenset[str]:
        """Digests a step may use."""
        return self._ready

    def on_trial(self) -> frozenset[str]:
        """Digests that are built and still to be tried."""
        return self._on_trial

    def take_merges(self) -> tuple[tuple[int, ...], tuple[Merge, ...]]:
        """See `engine.leases.MergedAdapters`."""
        if not (self._to_drop or self._to_begin):  # nearly always; whatever comes now is for the next step
            return (), ()
        with self._lock:
            drop, begin = tuple(self._to_drop), tuple(self._to_begin.values())
            self._begun |= self._to_begin.keys()
            self._to_drop, self._to_begin = [], {}
            return drop, begin

    def usage(self) -> tuple[int, int, dict[str, int]]:
        """(ready sets, bytes of these and of those being built, builds by outcome)."""
        with self._lock:
            return len(self._ready), self._held(), dict(self._builds)

    def close(self) -> None:
        """Ends the thread after the read under way."""
        with self._lock:
            self._is_closed = True
        self._loader.shutdown(wait=True, cancel_futures=True)

    # With the lock held.

    def _held(self) -> int:
        return sum(known.state.nbytes for known in self._sets.values())

    def _start(self, digest: str, nbytes: int = 0) -> None:
        """A new set, with `nbytes` set aside for it where they are known."""
        if self._refusal:
            self._sets[digest] = _Set(next(self._numbers), SetState("refused", self._refusal))
        elif not self._is_closed:
            begun = self._sets[digest] = _Set(next(self._numbers), SetState("building", nbytes=nbytes))
            self._loader.submit(self._build, digest, begun)

    def _start_what_fits(self) -> None:
        """Gives bytes that have become free to those that were refused for want of them."""
        free = self._budget - self._held()
        for digest, known in list(self._sets.items()):
            if known.lacking is not None and known.lacking <= free:
                self._start(digest, known.lacking)
                free -= known.lacking

    def _drop(self, digest: str) -> None:
        dropped = self._sets.pop(digest, None)
        self._ready -= {digest}
        self._on_trial -= {digest}
        if dropped is None:
            return
        if self._to_begin.pop(dropped.number, None) is not None:
            self._merges.discard(dropped.number)
        elif dropped.number in self._begun:
            self._begun.discard(dropped.number)
            self._to_drop.append(dropped.number)
            self._notify()

    # On the loading thread.

    def _build(self, digest: str, begun: _Set) -> None:
        try:
            if not self._is_desired(digest, begun):  # or the bytes of a deleted adapter would come back into memory
                return
            weights = self._load(digest)
            if not self._set_aside(digest, begun, self._measure(weights)):
                return
        except AdapterError as error:
            self._refuse(digest, begun, str(error))
        except Exception:
            logger.exception("merging %s failed", digest)
            self._refuse(digest, begun, "the merged weights could not be built; see the server's log")
        else:
            self._hand_over(digest, begun, weights)

    def _hand_over(self, digest: str, begun: _Set, weights: AdapterWeights) -> None:
        def done(error: AdapterError | None) -> None:  # on the worker's thread
            if error is None and self._try_out is None:
                self._publish(digest, begun, None)
            elif error is None:
                self._try(digest, begun)
            else:
                self._refuse(digest, begun, str(error))

        with self._lock:
            if self._is_desired(digest, begun):
                self._merges.put(begun.number, weights, done)
                self._to_begin[begun.number] = Merge(begun.number, digest)
        self._notify()

    def _is_desired(self, digest: str, begun: _Set) -> bool:
        return self._sets.get(digest) is begun

    def _set_aside(self, digest: str, begun: _Set, needed: int) -> bool:
        """Enters the bytes in the books; False when nobody desires it any more, AdapterError for no room."""
        with self._lock:
            if not self._is_desired(digest, begun):
                return False
            free = self._budget - self._held() + begun.state.nbytes
            if needed > free:
                begun.lacking = needed
                raise AdapterError(
                    f"the merged weights take {needed} bytes and {free} of {self._budget} are left",
                    remedy="drop another one or raise --merged-bytes",
                )
            begun.state = SetState("building", nbytes=needed)
            return True

    def _try(self, digest: str, begun: _Set) -> None:
        def tried(replay: Replay | None, reason: str) -> None:
            if reason:
                self._refuse(digest, begun, reason, replay)
            else:
                self._publish(digest, begun, replay)

        with self._lock:
            if not self._is_desired(digest, begun):
                return
            begun.is_built = True
            self._on_trial |= {digest}
        if self._try_out is not None:
            self._try_out(digest, tried)

    def _publish(self, digest: str, begun: _Set, replay: Replay | None) -> None:
        with self._lock:
            if self._is_desired(digest, begun):
                begun.state = SetState("ready", nbytes=begun.state.nbytes, replay=replay)
                self._on_trial -= {digest}
                self._ready |= {digest}
                self._builds["built"] += 1

    def _refuse(self, digest: str, begun: _Set, reason: str, replay: Replay | None = None) -> None:
        with self._lock:
            if not begun.is_built:
                self._begun.discard(begun.number)  # the worker keeps nothing of a merge that failed
            if self._is_desired(digest, begun):
                if begun.is_built:
                    self._drop(digest)
                    self._sets[digest] = begun
                begun.state = SetState("refused", reason, replay=replay)
                self._builds["refused"] += 1
                self._start_what_fits()

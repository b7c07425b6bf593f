"""Merged adapters: which are desired, being built, ready or refused, under one byte budget.

Built on a thread of its own from the frozen base; the engine thread only reads. Keyed by digest for the one base this
server holds. Who desires them is known elsewhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.apply.merge import merge, merged_bytes
from loramux_adapters.device import use_device
from loramux_adapters.errors import AdapterError
from loramux_adapters.weights import AdapterWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetState:
    """Of one digest; `reason` says why it was refused."""

    state: Literal["none", "building", "ready", "refused"] = "none"
    reason: str = ""
    nbytes: int = 0


@dataclass(eq=False)
class _Set:
    """One merge on its way: dropped and desired again, a digest gets another, and the first is void."""

    state: SetState
    dense: MergedWeights | None = None
    lacking: int | None = None  # bytes, where it was refused for them


class MergedWeightsCache:
    """All merged adapters of one adapted model. Every method is safe from any thread."""

    def __init__(
        self,
        adapted: AdaptedModel,
        load: Callable[[str], AdapterWeights],
        budget_bytes: int,
        refusal: str = "",
    ) -> None:
        """`load` reads an adapter's weights (may raise AdapterError); a `refusal` is the answer to all."""
        self._adapted, self._load, self._budget, self._refusal = adapted, load, budget_bytes, refusal
        self._sets: dict[str, _Set] = {}
        self._ready: frozenset[str] = frozenset()
        self._builds = {"built": 0, "refused": 0}
        self._is_closed = False
        self._lock = threading.Lock()
        self._builder = ThreadPoolExecutor(1, "loramux-merge", initializer=use_device, initargs=(adapted.base.device,))

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

    def forget(self, digest: str) -> None:
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

    def find(self, digest: str) -> MergedWeights | None:
        """The set, None when it was dropped meanwhile."""
        known = self._sets.get(digest)
        return None if known is None else known.dense

    def usage(self) -> tuple[int, int, dict[str, int]]:
        """(ready sets, bytes of these and of those being built, builds by outcome)."""
        with self._lock:
            return len(self._ready), self._held(), dict(self._builds)

    def close(self) -> None:
        """Ends the builder after the build under way."""
        with self._lock:
            self._is_closed = True
        self._builder.shutdown(wait=True, cancel_futures=True)

    # With the lock held.

    def _held(self) -> int:
        return sum(known.state.nbytes for known in self._sets.values())

    def _start(self, digest: str, nbytes: int = 0) -> None:
        """A new set, with `nbytes` set aside for it where they are known."""
        if self._refusal:
            self._sets[digest] = _Set(SetState("refused", self._refusal))
        elif not self._is_closed:
            begun = self._sets[digest] = _Set(SetState("building", nbytes=nbytes))
            self._builder.submit(self._build, digest, begun)

    def _start_what_fits(self) -> None:
        """Gives bytes that have become free to those that were refused for want of them."""
        free = self._budget - self._held()
        for digest, known in list(self._sets.items()):
            if known.lacking is not None and known.lacking <= free:
                self._start(digest, known.lacking)
                free -= known.lacking

    def _drop(self, digest: str) -> None:
        self._sets.pop(digest, None)
        self._ready -= {digest}

    # On the builder's thread.

    @torch.inference_mode()
    def _build(self, digest: str, begun: _Set) -> None:
        try:
            if not self._is_desired(digest, begun):  # or the bytes of a deleted adapter would come back into memory
                return
            weights = self._load(digest)
            needed = merged_bytes(self._adapted, weights)
            if not self._set_aside(digest, begun, needed):
                return
            dense = merge(self._adapted, weights)
        except AdapterError as error:
            self._refuse(digest, begun, str(error))
        except Exception:
            logger.exception("merging %s failed", digest)
            self._refuse(digest, begun, "the merged weights could not be built; see the server's log")
        else:
            self._publish(digest, begun, dense)

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

    def _publish(self, digest: str, begun: _Set, dense: MergedWeights) -> None:
        with self._lock:
            if self._is_desired(digest, begun):
                begun.dense, begun.state = dense, SetState("ready", nbytes=begun.state.nbytes)
                self._ready |= {digest}
                self._builds["built"] += 1

    def _refuse(self, digest: str, begun: _Set, reason: str) -> None:
        with self._lock:
            if self._is_desired(digest, begun):
                begun.state = SetState("refused", reason)
                self._builds["refused"] += 1
                self._start_what_fits()

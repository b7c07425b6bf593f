"""Materialised adapters: which are wanted, being built, ready or refused, under one byte budget.

Built on a thread of its own from the frozen base, dropped on request; the engine thread only reads. Keyed by digest
for the one base this server holds. When to want one is decided elsewhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from lorica_adapters.apply.batch import DenseWeights
from lorica_adapters.apply.inject import AdaptedModel
from lorica_adapters.apply.materialise import materialise, materialised_bytes
from lorica_adapters.errors import AdapterError
from lorica_adapters.weights import AdapterWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetState:
    """Of one digest; `reason` says why it was refused."""

    state: Literal["none", "building", "ready", "refused"] = "none"
    reason: str = ""
    nbytes: int = 0


class WeightSets:
    """All materialised adapters of one adapted model. Every method is safe from any thread."""

    def __init__(
        self,
        adapted: AdaptedModel,
        load: Callable[[str], AdapterWeights],
        budget_bytes: int,
        refusal: str = "",
    ) -> None:
        """`load` reads an adapter's weights (may raise AdapterError); a `refusal` is the answer to every wish."""
        self._adapted, self._load, self._budget, self._refusal = adapted, load, budget_bytes, refusal
        self._states: dict[str, SetState] = {}
        self._sets: dict[str, DenseWeights] = {}
        self._ready: frozenset[str] = frozenset()
        self._builds = {"built": 0, "refused": 0}
        self._lock = threading.Lock()
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="lorica-materialise")

    def want(self, digest: str, wanted: bool) -> None:
        """Builds a set in the background, or drops it. Asking again for a refused one tries again."""
        with self._lock:
            state = self._states.get(digest, SetState()).state
            if not wanted:
                self._forget(digest)
            elif self._refusal:
                self._states[digest] = SetState("refused", self._refusal)
            elif state in ("none", "refused"):
                self._states[digest] = SetState("building")
                self._builder.submit(self._build, digest)

    def state(self, digest: str) -> SetState:
        """Where a set is."""
        return self._states.get(digest, SetState())

    def ready(self) -> frozenset[str]:
        """Digests a step may use."""
        return self._ready

    def find(self, digest: str) -> DenseWeights | None:
        """The set, None when it was dropped meanwhile."""
        return self._sets.get(digest)

    def usage(self) -> tuple[int, int, dict[str, int]]:
        """(ready sets, their bytes, builds by outcome)."""
        with self._lock:
            return len(self._sets), self._held(), dict(self._builds)

    def close(self) -> None:
        """Ends the builder after the build under way."""
        self._builder.shutdown(wait=True, cancel_futures=True)

    def _held(self) -> int:
        return sum(state.nbytes for state in self._states.values())

    def _forget(self, digest: str) -> None:
        self._states.pop(digest, None)
        self._sets.pop(digest, None)
        self._ready = frozenset(self._sets)

    @torch.inference_mode()
    def _build(self, digest: str) -> None:
        try:
            weights = self._load(digest)
            needed = materialised_bytes(self._adapted, weights)
            with self._lock:
                if self.state(digest).state != "building":
                    return
                free = self._budget - self._held()
                if needed > free:
                    raise AdapterError(
                        f"the dense copy takes {needed} bytes and {free} of {self._budget} are left",
                        remedy="drop another one or raise --materialised-bytes",
                    )
                self._states[digest] = SetState("building", nbytes=needed)
            dense = materialise(self._adapted, weights)
        except AdapterError as error:
            self._refuse(digest, str(error))
        except Exception:
            logger.exception("materialising %s failed", digest)
            self._refuse(digest, "the dense copy could not be built; see the server's log")
        else:
            self._publish(digest, dense, needed)

    def _publish(self, digest: str, dense: DenseWeights, nbytes: int) -> None:
        with self._lock:
            if self.state(digest).state == "building":
                self._sets[digest] = dense
                self._states[digest] = SetState("ready", nbytes=nbytes)
                self._ready = frozenset(self._sets)
                self._builds["built"] += 1

    def _refuse(self, digest: str, reason: str) -> None:
        with self._lock:
            self._builds["refused"] += 1
            if self.state(digest).state == "building":
                self._states[digest] = SetState("refused", reason)

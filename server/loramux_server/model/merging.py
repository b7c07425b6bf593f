"""Merged weights on the device: built group by group between steps, kept until they are dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.apply.merge import merging
from loramux_adapters.errors import AdapterError
from loramux_adapters.weights import AdapterWeights
from loramux_server.engine.plan import Merge, WorkerLost
from loramux_server.model.faults import explain_background

MergeDone = Callable[[AdapterError | None], None]
"""Called once, on the worker's thread: steps may use the merged weights, or why they cannot be had."""


@dataclass(eq=False)
class _Merging:
    digest: str
    pieces: Generator[None, None, MergedWeights]
    done: MergeDone
    result: MergedWeights | None = None


class Merges:
    """All merges of one adapted model, by number. `put` and `discard` are for any thread, the rest for the worker."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._orders: dict[int, _Merging] = {}  # not begun
        self._begun: dict[int, _Merging] = {}  # in this order
        self._lock = threading.Lock()  # of the orders

    def put(self, number: int, weights: AdapterWeights, done: MergeDone) -> None:
        """Leaves host weights for the merge `number`, before a plan says to begin it."""
        with self._lock:
            self._orders[number] = _Merging(weights.spec.digest, merging(self._adapted, weights), done)

    def discard(self, number: int) -> None:
        """Takes back a merge that no plan has named yet."""
        with self._lock:
            self._orders.pop(number, None)

    def begin(self, merge: Merge) -> None:
        """Queues the merge for `advance`. Called again if it raised.

        Raises WorkerLost where its weights were not left.
        """
        with self._lock:
            order = self._orders.get(merge.number)
        if order is None or order.digest != merge.digest:
            raise WorkerLost(f"merge {merge.number} of {merge.digest[:12]} is to begin without its weights")
        self._begun[merge.number] = order
        self.discard(merge.number)  # last: what raised is called again

    def drop(self, number: int) -> None:
        """Frees merged weights, ready or not."""
        self._begun.pop(number, None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be merged."""
        return all(merge.result is not None for merge in self._begun.values())

    def advance(self) -> None:
        """Merges one group. Raises DeviceLost; other errors go to the `done` at fault."""
        for number, merge in self._begun.items():
            if merge.result is None:
                self._merge_piece(number, merge)
                return

    def find(self, digest: str) -> MergedWeights:
        """The merged weights, after whatever is left to merge. Raises WorkerLost where they were not begun, or fail."""
        for merge in self._begun.values():
            if merge.digest == digest:
                try:
                    while merge.result is None:
                        self._advance_piece(merge)
                except Exception as error:  # another process did merge them: the two are no longer the same
                    raise WorkerLost(f"merging {digest[:12]} failed in a step that uses it") from error
                return merge.result
        raise WorkerLost(f"a step is to use merged weights of {digest[:12]}, which nobody began to merge")

    def _merge_piece(self, number: int, merge: _Merging) -> None:
        try:
            self._advance_piece(merge)
        except Exception as error:
            del self._begun[number]
            merge.done(explain_background(error, f"merging adapter {merge.digest}"))
        else:
            if merge.result is not None:
                merge.done(None)

    def _advance_piece(self, merge: _Merging) -> None:
        try:
            next(merge.pieces)
        except StopIteration as end:
            merge.result = end.value

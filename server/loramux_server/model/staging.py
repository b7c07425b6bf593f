"""Adapters between host memory and their slots: copied piece by piece, so that no step waits for a whole one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loramux_adapters.apply.slots import PreparedAdapter, SlotTensors
from loramux_adapters.binding import Binding, RankRanges
from loramux_adapters.errors import AdapterError
from loramux_adapters.residency.tiers import CopyDone
from loramux_adapters.weights import AdapterWeights
from loramux_server.engine.plan import WorkerLost
from loramux_server.model.faults import explain_background

_LEAST_PIECE = 32 << 10
"""Bytes that the shortest copy counts as: what calling it costs beyond its bytes (8 us, on 2 cores of a Xeon)."""

_RETRY_SECONDS = 0.2
"""Between two tries to clear a slot: an idle worker would try without a pause."""


@dataclass(eq=False)
class _Copy:
    slot: int
    adapter: PreparedAdapter
    rank_ranges: RankRanges
    pieces: Iterator[int]
    done: CopyDone
    is_complete: bool = False
    error: AdapterError | None = None
    clear_at: float = 0.0  # when its slot is to be cleared, after an error

    @property
    def is_due(self) -> bool:
        """Whether there is something to copy, or to clear after an error."""
        return not self.is_complete and (self.error is None or time.monotonic() >= self.clear_at)


class StagedAdapters:
    """Implements the pool's `DeviceTier`. `cost` and `stage` are for its threads, the rest is for the worker."""

    def __init__(self, slots: SlotTensors, notify: Callable[[], None]) -> None:
        """`notify` is called when there is something to copy."""
        self._slots, self._notify = slots, notify
        self._copies: list[_Copy] = []  # in the order in which they came
        self._lock = threading.Lock()  # of the list

    def cost(self, weights: AdapterWeights) -> tuple[Mapping[str, int], int]:
        """(rank rows by module, device bytes beside them). Raises AdapterIncompatible."""
        return self._slots.cost(weights)

    def stage(self, slot: int, weights: AdapterWeights, rank_ranges: RankRanges, done: CopyDone) -> None:
        """Prepares the tensors and leaves them to `advance`. Raises AdapterIncompatible."""
        adapter = self._slots.prepare(weights)
        copy = _Copy(slot, adapter, rank_ranges, self._slots.copy(slot, adapter, rank_ranges), done)
        with self._lock:
            self._copies.append(copy)
        self._notify()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be done now."""
        return not any(copy.is_due for copy in self._all())

    def advance(self, budget: int) -> None:
        """Copies what came first, about `budget` bytes. Raises DeviceLost; other errors go to the `done` at fault."""
        for copy in self._all():
            while not copy.is_complete and copy.error is None:
                if budget <= 0:
                    return
                budget -= self._copy_piece(copy)
            if copy.error is not None and copy.is_due:
                self._give_up(copy, copy.error)

    def bind(self, binding: Binding) -> None:
        """Makes an adapter's slot usable, after whatever is left to copy. Called again if it raised.

        Raises WorkerLost where the adapter was not staged there.
        """
        copy = next((copy for copy in self._all() if copy.slot == binding.slot), None)
        if copy is None or copy.adapter.digest != binding.digest or copy.error is not None:
            raise WorkerLost(f"slot {binding.slot} is to be bound to {binding.digest[:12]}, which was not staged there")
        try:
            for _ in copy.pieces:
                pass
        except BaseException:
            copy.pieces = self._slots.copy(copy.slot, copy.adapter, copy.rank_ranges)  # from the first piece again
            raise
        self._slots.bind(binding.slot, copy.adapter)
        self._remove(copy)  # last: what raised is called again

    def unbind(self, slot: int) -> None:
        """Takes a slot out of use. Called again if it raised."""
        self._slots.unbind(slot)

    def _copy_piece(self, copy: _Copy) -> int:
        try:
            nbytes = next(copy.pieces, None)
        except Exception as error:
            copy.error = explain_background(error, f"copying adapter {copy.adapter.digest}")
            return _LEAST_PIECE
        if nbytes is None:
            copy.is_complete = True
            copy.done(None)
            return 0
        return max(nbytes, _LEAST_PIECE)

    def _give_up(self, copy: _Copy, error: AdapterError) -> None:
        """Its slot goes to another only when nothing of it is left there."""
        try:
            self._slots.unbind(copy.slot)
        except Exception as again:
            explain_background(again, f"clearing slot {copy.slot}")  # later, then
            copy.clear_at = time.monotonic() + _RETRY_SECONDS
            return
        self._remove(copy)
        copy.done(error)

    def _remove(self, copy: _Copy) -> None:
        with self._lock:
            self._copies.remove(copy)

    def _all(self) -> list[_Copy]:
        with self._lock:
            return list(self._copies)

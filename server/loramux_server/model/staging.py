"""Adapters between host memory and their slots: copied piece by piece, so that no step waits for a whole one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loramux_adapters.apply.slots import PreparedAdapter, SlotTensors
from loramux_adapters.binding import Binding, RankRanges
from loramux_adapters.residency.tiers import CopyDone
from loramux_adapters.weights import AdapterWeights
from loramux_server.engine.plan import WorkerLost
from loramux_server.model.faults import explain_background

_LEAST_PIECE = 32 << 10
"""Bytes that the shortest copy counts as: what calling it costs beyond its bytes (8 us, on 2 cores of a Xeon)."""


@dataclass(eq=False)
class _Copy:
    adapter: PreparedAdapter
    pieces: Iterator[int]
    done: CopyDone
    is_complete: bool = False


class StagedAdapters:
    """Implements the pool's `DeviceTier`. `cost` and `stage` are for its threads, the rest is for the worker."""

    def __init__(self, slots: SlotTensors, notify: Callable[[], None]) -> None:
        """`notify` is called when there is something to copy."""
        self._slots, self._notify = slots, notify
        self._copies: dict[int, _Copy] = {}  # by slot, in the order in which they came
        self._lock = threading.Lock()  # of the order

    def cost(self, weights: AdapterWeights) -> tuple[Mapping[str, int], int]:
        """(rank rows by module, device bytes beside them). Raises AdapterIncompatible."""
        return self._slots.cost(weights)

    def stage(self, slot: int, weights: AdapterWeights, rank_ranges: RankRanges, done: CopyDone) -> None:
        """Prepares the tensors and leaves them to `advance`. Raises AdapterIncompatible."""
        adapter = self._slots.prepare(weights)
        with self._lock:
            self._copies[slot] = _Copy(adapter, self._slots.copy(slot, adapter, rank_ranges), done)
        self._notify()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to copy."""
        return all(copy.is_complete for copy in self._all())

    def advance(self, budget: int) -> None:
        """Copies what came first, about `budget` bytes. Raises DeviceLost; other errors go to the `done` at fault."""
        for slot, copy in self._all_with_slots():
            while not copy.is_complete:
                if budget <= 0:
                    return
                budget -= self._copy_piece(slot, copy)

    def bind(self, binding: Binding) -> None:
        """Makes an adapter's slot usable, after whatever is left to copy. Raises WorkerLost where it was not staged."""
        copy = dict(self._all_with_slots()).get(binding.slot)
        if copy is None or copy.adapter.digest != binding.digest:
            raise WorkerLost(f"slot {binding.slot} is to be bound to {binding.digest[:12]}, which was not staged there")
        for _ in copy.pieces:
            pass
        self._slots.bind(binding.slot, copy.adapter)
        with self._lock:  # last: what raised is called again
            del self._copies[binding.slot]

    def unbind(self, slot: int) -> None:
        """Takes a slot out of use."""
        self._slots.unbind(slot)

    def _copy_piece(self, slot: int, copy: _Copy) -> int:
        try:
            nbytes = next(copy.pieces, None)
        except Exception as error:
            self._slots.unbind(slot)
            with self._lock:
                del self._copies[slot]
            copy.is_complete = True
            copy.done(explain_background(error, f"copying adapter {copy.adapter.digest}"))
            return _LEAST_PIECE
        if nbytes is None:
            copy.is_complete = True
            copy.done(None)
            return 0
        return max(nbytes, _LEAST_PIECE)

    def _all(self) -> list[_Copy]:
        return [copy for _, copy in self._all_with_slots()]

    def _all_with_slots(self) -> list[tuple[int, _Copy]]:
        with self._lock:
            return list(self._copies.items())

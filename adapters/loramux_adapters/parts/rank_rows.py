"""Which rank rows of a module's pool belong to which slot."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakValueDictionary

import torch


class RankRows:
    """Slot -> (first rank row, number of rows) of one module's pool.

    Immutable; modules whose slots lie alike share one, so that what a step prepares for it is shared too.
    """

    def __init__(self, ranges: Mapping[int, tuple[int, int]], capacity: int, device: torch.device) -> None:
        self.ranges = dict(ranges)
        row_slots = torch.full((capacity,), -2, dtype=torch.int32)
        for slot, (row, rows) in self.ranges.items():
            row_slots[row : row + rows] = slot
        self.row_slots = row_slots.to(device)


class RankRowsTable:
    """Makes the RankRows of all modules of one model: each content once, as long as somebody holds it."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self._device = capacity, device
        self.empty = RankRows({}, capacity, device)
        self._known: WeakValueDictionary[tuple[tuple[int, int, int], ...], RankRows] = WeakValueDictionary()
        self._slot = -1
        self._changes: dict[tuple[RankRows, tuple[int, int] | None], RankRows] = {}  # of `_slot`

    def changed(self, rows: RankRows, slot: int, place: tuple[int, int] | None) -> RankRows:
        """`rows` with `slot` at `place`, or without it. Cheap for many modules alike, one after the other."""
        if slot != self._slot:
            self._slot, self._changes = slot, {}
        found = self._changes.get((rows, place))
        if found is None:
            ranges = {key: value for key, value in rows.ranges.items() if key != slot}
            if place is not None:
                ranges[slot] = place
            found = self._changes[rows, place] = self._find(ranges)
        return found

    def _find(self, ranges: Mapping[int, tuple[int, int]]) -> RankRows:
        if not ranges:
            return self.empty
        key = tuple(sorted((slot, first, count) for slot, (first, count) in ranges.items()))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = RankRows(ranges, self.capacity, self._device)
        return found

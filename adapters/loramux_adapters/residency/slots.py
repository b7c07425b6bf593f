"""The slot table: who holds which rank rows of every module, and the book-keeping of one slot. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loramux_adapters.binding import RankRanges
from loramux_adapters.residency.row_space import RowSpace

ROW_MULTIPLE = 8
"""A rank is rounded up to this many rows, so that products keep aligned, row-invariant shapes."""


@dataclass
class Slot:
    """One place on the device and the adapter in it."""

    number: int
    digest: str
    rows: RankRanges
    nbytes: int  # as uploaded
    leases: int = 0
    used_at: int = 0  # tick of the last acquisition or of the binding
    bound_at: int = 0
    was_leased: bool = False


class SlotTable:
    """Slot numbers, rank rows and extra bytes, all or nothing per adapter."""

    def __init__(self, modules: Iterable[str], capacity: int, max_slots: int, extra_budget: int) -> None:
        self.capacity, self.extra_budget = capacity, extra_budget
        self._spaces = {name: RowSpace(capacity) for name in modules}
        self._free_numbers = list(range(max_slots - 1, -1, -1))
        self._extra_used = 0
        self._taken: dict[int, tuple[RankRanges, int]] = {}

    def needs(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Rank rows per linear module; modules without a pool (embeddings) need none."""
        return {name: -(-rank // ROW_MULTIPLE) * ROW_MULTIPLE for name, rank in ranks.items() if name in self._spaces}

    def can_ever_hold(self, needs: Mapping[str, int], extra_bytes: int) -> bool:
        """Whether an empty table would have room."""
        return max(needs.values(), default=0) <= self.capacity and extra_bytes <= self.extra_budget

    def can_take_without(self, needs: Mapping[str, int], extra_bytes: int, numbers: Collection[int]) -> bool:
        """Whether `try_take` would succeed once the slots `numbers` were free."""
        leaving = [self._taken[number] for number in numbers]
        if not (self._free_numbers or leaving):
            return False
        if self._extra_used - sum(extra for _, extra in leaving) + extra_bytes > self.extra_budget:
            return False
        return all(
            self._spaces[name].find(count, {rows[name] for rows, _ in leaving if name in rows}) is not None
            for name, count in needs.items()
        )

    def try_take(self, needs: Mapping[str, int], extra_bytes: int) -> tuple[int, RankRanges] | None:
        """A slot number and its rows, or None and no change."""
        if not self._free_numbers or self._extra_used + extra_bytes > self.extra_budget:
            return None
        rows: dict[str, tuple[int, int]] = {}
        for name, count in needs.items():
            first = self._spaces[name].find(count)
            if first is None:
                return None
            rows[name] = (first, count)
        for name, (first, count) in rows.items():
            self._spaces[name].take(first, count)
        number = self._free_numbers.pop()
        self._extra_used += extra_bytes
        self._taken[number] = (rows, extra_bytes)
        return number, rows

    def free(self, number: int) -> None:
        """Gives a slot back."""
        rows, extra_bytes = self._taken.pop(number)
        for name, (first, count) in rows.items():
            self._spaces[name].free(first, count)
        self._extra_used -= extra_bytes
        self._free_numbers.append(number)

    @property
    def numbers(self) -> set[int]:
        """Slot numbers taken."""
        return set(self._taken)

    @property
    def rows_used(self) -> int:
        """Rank rows taken in the fullest module."""
        return max((space.used for space in self._spaces.values()), default=0)

    def check(self) -> None:
        """Raises ValueError when the books do not add up."""
        for name, space in self._spaces.items():
            space.check()
            owned = sum(rows[name][1] for rows, _ in self._taken.values() if name in rows)
            if owned != space.used:
                raise ValueError(f"{name}: {space.used} rows taken, {owned} owned")
        if self._extra_used != sum(extra for _, extra in self._taken.values()):
            raise ValueError("extra bytes do not add up")

"""Which rank rows of a module's pool are taken: first fit over intervals. Integers only."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection


class RowSpace:
    """Rows 0 .. capacity - 1 of one module."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: list[tuple[int, int]] = []  # (first, rows), sorted, disjoint

    @property
    def used(self) -> int:
        """Rows taken."""
        return sum(rows for _, rows in self._taken)

    def find(self, rows: int, without: Collection[tuple[int, int]] = ()) -> int | None:
        """The lowest first row of a free run of `rows`, as if the runs `without` were free. Takes nothing."""
        end = 0
        for first, taken in self._taken:
            if (first, taken) in without:
                continue
            if first - end >= rows:
                return end
            end = first + taken
        return end if self.capacity - end >= rows else None

    def take(self, first: int, rows: int) -> None:
        """Takes a run that `find` gave."""
        insort(self._taken, (first, rows))

    def free(self, first: int, rows: int) -> None:
        """Gives a run back. Raises ValueError when exactly that run is not taken."""
        self._taken.remove((first, rows))

    def check(self) -> None:
        """Raises ValueError when runs overlap or leave the space."""
        end = 0
        for first, rows in self._taken:
            if first < end or rows <= 0 or first + rows > self.capacity:
                raise ValueError(f"rows {first}+{rows} overlap or leave {self.capacity}")
            end = first + rows

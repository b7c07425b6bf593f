"""Rank rows of modules: shared while alike, whatever the order of changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.parts.rank_rows import RankRows, RankRowsTable

CPU = torch.device("cpu")
CHANGES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0, 8, 16])), max_size=12)


@given(CHANGES, CHANGES)
def test_equal_contents_are_one_object(left: list[tuple[int, int | None]], right: list[tuple[int, int | None]]) -> None:
    table = RankRowsTable(64, CPU)

    def walk(changes: list[tuple[int, int | None]]) -> RankRows:
        rows = table.empty
        for slot, first in changes:
            rows = table.changed(rows, slot, None if first is None else (slot * 16 + first // 2, 4))
        return rows

    one, other = walk(left), walk(right)
    final: dict[int, tuple[int, int]] = {}
    for slot, first in left:
        final.pop(slot, None)
        if first is not None:
            final[slot] = (slot * 16 + first // 2, 4)
    assert one.ranges == final
    assert (one is other) == (one.ranges == other.ranges)
    for slot, (row, count) in one.ranges.items():
        assert (one.row_slots[row : row + count] == slot).all()
    assert int((one.row_slots >= 0).sum()) == sum(count for _, count in one.ranges.values())


def test_the_same_change_of_another_slot_is_another() -> None:
    table = RankRowsTable(32, CPU)
    rows = table.changed(table.changed(table.empty, 0, (0, 8)), 1, (8, 8))
    assert table.changed(rows, 0, None).ranges == {1: (8, 8)}
    assert table.changed(rows, 1, None).ranges == {0: (0, 8)}
    assert table.changed(table.empty, 0, (0, 8)) is table.changed(rows, 1, None)
    assert table.changed(table.empty, 1, (0, 8)).ranges == {1: (0, 8)}

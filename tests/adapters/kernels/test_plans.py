"""Which rows use which rank rows: runs of equal slot, layouts, and the plan they make together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.apply.batch import RowMap, segments_of
from loramux_adapters.kernels.gathered import GatheredKernels, GatheredPlan
from loramux_adapters.kernels.protocol import Kernels, LowRankPools
from loramux_adapters.kernels.reference import ReferenceKernels
from loramux_adapters.parts.rank_rows import RankRows

CPU = torch.device("cpu")
SORTED_SLOTS = st.lists(st.integers(-1, 5), max_size=40).map(sorted)
KERNELS = pytest.mark.parametrize("kernels", [GatheredKernels(), ReferenceKernels()], ids=["gathered", "reference"])


@st.composite
def layouts(draw: st.DrawFn) -> RankRows:
    """Some of the slots 0..5, each with its run of rows, gaps between."""
    ranges, place = {}, 0
    for slot in draw(st.permutations(range(6))):
        if draw(st.booleans()):
            place += draw(st.integers(0, 3))
            rows = draw(st.integers(1, 4)) * 8
            ranges[slot] = (place, rows)
            place += rows
    return RankRows(ranges, place + draw(st.integers(0, 5)), CPU)


def prepared_for(slots: list[int], kernels: Kernels) -> Any:
    return kernels.prepare(len(slots), segments_of(slots), CPU)


def plan_of(prepared: Any, layout: RankRows) -> Any:
    """What the kernels keep of a layout."""
    rows, pool = torch.zeros(prepared.rows, 1), torch.zeros(1, len(layout.row_slots), 1)
    return prepared.plans(rows, rows, LowRankPools(pool, [pool[0]], [(0, 1)], [layout]))[0]


@given(SORTED_SLOTS)
def test_segments_cover_each_adapted_row_once(slots: list[int]) -> None:
    segments = segments_of(slots)
    covered = {row: s.slot for s in segments for row in range(s.start, s.stop)}
    assert covered == {row: slot for row, slot in enumerate(slots) if slot >= 0}
    assert sum(s.stop - s.start for s in segments) == len(covered)
    assert all(before.stop == after.start for before, after in itertools.pairwise(segments))


@given(st.lists(st.integers(-1, 3), max_size=20))
def test_base_rows_come_first_or_it_is_refused(slots: list[int]) -> None:
    adapted = [slot >= 0 for slot in slots]
    if adapted == sorted(adapted):
        assert [s.slot for s in segments_of(slots)] == [
            slot for row, slot in enumerate(slots) if slot >= 0 and (row == 0 or slots[row - 1] != slot)
        ]
    else:
        with pytest.raises(ValueError, match="has no adapter but follows"):
            segments_of(slots)


@given(layouts())
def test_a_layout_marks_each_row_with_its_slot(layout: RankRows) -> None:
    for row, owner in enumerate(layout.row_slots.tolist()):
        holding = [slot for slot, (first, rows) in layout.ranges.items() if first <= row < first + rows]
        assert holding == ([owner] if owner >= 0 else [])


@KERNELS
@given(slots=SORTED_SLOTS, layout=layouts())
def test_a_plan_names_exactly_the_rank_rows_of_each_token(kernels: Kernels, slots: list[int], layout: RankRows) -> None:
    plan = plan_of(prepared_for(slots, kernels), layout)
    if isinstance(plan, tuple):  # the reference's
        plan = GatheredPlan(plan, plan[0].start)
    if plan is None:
        assert not {slot for slot in slots if slot >= 0} & set(layout.ranges)
        return
    assert plan.first == plan.segments[0].start
    assert not any(slot in layout.ranges for slot in slots[: plan.first])
    if plan.drop is None:
        found = {row: range(s.row, s.row + s.rows) for s in plan.segments for row in range(s.start, s.stop)}
        owned = {row: range(*_span(layout.ranges[slot])) for row, slot in enumerate(slots) if slot in layout.ranges}
        assert found == owned
        return
    for row in range(plan.first, len(slots)):
        drop = plan.drop[row - plan.first].tolist()
        kept = {plan.low + index for index, is_dropped in enumerate(drop) if not is_dropped}
        assert kept == (set(range(*_span(layout.ranges[slots[row]]))) if slots[row] in layout.ranges else set())


def test_a_plan_is_made_once_per_layout() -> None:
    prepared = prepared_for([-1, 0, 1], GatheredKernels())
    layout, other = RankRows({0: (0, 8)}, 16, CPU), RankRows({0: (0, 8)}, 16, CPU)
    assert plan_of(prepared, layout) is plan_of(prepared, layout)
    assert plan_of(prepared, layout) is not plan_of(prepared, other)


def test_no_rows_make_no_plan() -> None:
    layout = RankRows({0: (0, 8)}, 8, CPU)
    assert plan_of(prepared_for([-1, 4], GatheredKernels()), layout) is None
    y = torch.zeros(1, 1)
    for slots in ([], [-1]):  # the kernels are not asked
        RowMap(slots, GatheredKernels(), CPU).add_low_rank(y, y, LowRankPools(y[None], [y], [(0, 1)], [layout]))


def _span(place: tuple[int, int]) -> tuple[int, int]:
    first, rows = place
    return first, first + rows

"""Gathered and reference kernels against a plain product per row: rank x rows x popularity x dtype, both ways."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch

from loramux_adapters.apply.batch import segments_of
from loramux_adapters.kernels import gathered
from loramux_adapters.kernels.gathered import GatheredKernels, GatheredPlan
from loramux_adapters.kernels.native_low_rank import NativeKernels, find_native
from loramux_adapters.kernels.protocol import Kernels, LowRankPools, SlotSegment
from loramux_adapters.kernels.reference import ReferenceKernels
from loramux_adapters.kernels.select import select_kernels
from loramux_adapters.parts.rank_rows import RankRows

CPU = torch.device("cpu")
IN, OUTS, CAPACITY = 48, (40, 24, 24), 640
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
EVERY_KERNEL = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(GatheredKernels(), id="gathered"),
        pytest.param(ReferenceKernels(), id="reference"),
        pytest.param(
            find_native(),
            id="native",
            marks=pytest.mark.skipif(find_native() is None, reason="this machine has no C compiler"),
        ),
    ],
)
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "with base rows")


def slots_of(popularity: str, rows: int, seed: int = 0) -> list[int]:
    """A slot per row, base rows (-1) first, sorted."""
    draw = random.Random(seed)
    match popularity:
        case "distinct":
            slots = list(range(rows))
        case "uniform":
            slots = [draw.randrange(6) for _ in range(rows)]
        case "zipf":
            slots = draw.choices(range(12), [1 / (rank + 1) for rank in range(12)], k=rows)
        case "identical":
            slots = [3] * rows
        case _:
            slots = [draw.choice([-1, -1, 0, 1, 2]) for _ in range(rows)]
    return sorted(slots)


@dataclass
class Case:
    """Pools of three maps over one input, filled for some slots; rank rows that belong to nobody hold garbage."""

    slots: list[int]
    x: torch.Tensor
    y: torch.Tensor
    a: torch.Tensor
    b: list[torch.Tensor]
    layouts: list[RankRows]
    columns: list[tuple[int, int]]

    @classmethod
    def make(
        cls, slots: Sequence[int], rank: int, dtype: torch.dtype, *, equal_layouts: bool = True, seed: int = 0
    ) -> Case:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        present = sorted({slot for slot in slots if slot >= 0})
        layouts = [_layout(present, rank, draw, skip=0.0)]
        for _ in OUTS[1:]:
            layouts.append(layouts[0] if equal_layouts else _layout(present, rank, draw, skip=0.3))
        ends = [sum(OUTS[: index + 1]) for index in range(len(OUTS))]
        return cls(
            slots=list(slots),
            x=torch.randn(len(slots), IN).to(dtype),
            y=torch.randn(len(slots), sum(OUTS)).to(dtype),
            a=torch.randn(len(OUTS), CAPACITY, IN).to(dtype),
            b=[(torch.randn(CAPACITY, out) / rank**0.5).to(dtype) for out in OUTS],
            layouts=layouts,
            columns=[(end - out, end) for end, out in zip(ends, OUTS, strict=True)],
        )

    def expected(self) -> torch.Tensor:
        """Row by row, in float64."""
        y = self.y.double()
        for row, slot in enumerate(self.slots):
            for member, (begin, end) in enumerate(self.columns):
                first, count = self.layouts[member].ranges.get(slot, (0, 0))
                a, b = self.a[member, first : first + count], self.b[member][first : first + count]
                y[row, begin:end] += (self.x[row].double() @ a.double().T) @ b.double()
        return y

    def run(self, kernels: Kernels, force: str | None = None) -> torch.Tensor:
        """What `kernels` make of it; `force` overrides the choice between one product and segments."""
        cost = {None: gathered.SEGMENT_COST, "one product": 1 << 40, "segments": -(1 << 40)}[force]
        y = self.y.clone()
        segments = segments_of(self.slots)
        if segments:
            with patch.object(gathered, "SEGMENT_COST", cost):
                kernels.add(y, self.x, self.pools, kernels.prepare(len(self.slots), segments, CPU))
        return y

    @property
    def pools(self) -> LowRankPools:
        return LowRankPools(self.a, self.b, self.columns, self.layouts)


def _layout(present: Sequence[int], rank: int, draw: random.Random, skip: float) -> RankRows:
    """The slots in a random order with gaps between them; some have no rows here."""
    rows = -(-rank // 8) * 8
    ranges, place = {}, 0
    for slot in draw.sample(list(present), len(present)):
        if draw.random() < skip:
            continue
        place += 8 * draw.randrange(2)
        if place + rows <= CAPACITY:
            ranges[slot] = (place, rows)
        place += rows
    return RankRows(ranges, CAPACITY, CPU)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("rank", [1, 8, 20, 64])
def test_every_row_gets_its_own_adapter(rank: int, rows: int, popularity: str, dtype: torch.dtype) -> None:
    case = Case.make(slots_of(popularity, rows), rank, dtype)
    expected = case.expected()
    assert_close(case.run(ReferenceKernels()), expected, dtype)
    for force in (None, "one product", "segments"):
        assert_close(case.run(GatheredKernels(), force), expected, dtype)


@pytest.mark.parametrize("force", ["one product", "segments"])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_members_whose_slots_lie_differently(popularity: str, force: str) -> None:
    for seed in range(4):
        case = Case.make(slots_of(popularity, 24, seed), 8, torch.float32, equal_layouts=False, seed=seed)
        expected = case.expected()
        assert_close(case.run(GatheredKernels(), force), expected, torch.float32)
        assert_close(case.run(ReferenceKernels()), expected, torch.float32)


@pytest.mark.parametrize("kernels", [GatheredKernels(), ReferenceKernels()], ids=["gathered", "reference"])
def test_rows_before_the_first_adapter_are_not_touched(kernels: Kernels) -> None:
    case = Case.make([-1] * 5 + [0, 0, 1], 8, torch.float32)
    assert torch.equal(case.run(kernels)[:5], case.y[:5])


def test_ranks_mix_in_one_pool() -> None:
    case = Case.make([0, 0, 1, 2, 2, 2], 8, torch.float32)
    layout = RankRows({0: (0, 8), 1: (8, 512), 2: (528, 64)}, CAPACITY, CPU)
    case.layouts = [layout] * 3
    for force in ("one product", "segments"):
        assert_close(case.run(GatheredKernels(), force), case.expected(), torch.float32)


@pytest.mark.parametrize("equal_layouts", [True, False], ids=["equal layouts", "different layouts"])
@pytest.mark.parametrize("force", [None, "one product", "segments"])
def test_a_nan_stays_with_its_adapter(force: str | None, equal_layouts: bool) -> None:
    """In A, in the product of finite values, or in a row of x. B is finite by contract: see test_slots."""
    slots = [-1, 0, 1, 1, 2, 3]
    case = Case.make(slots, 8, torch.float32, equal_layouts=equal_layouts, seed=3)
    sound = case.run(GatheredKernels(), force)
    ill = [slot == 1 for slot in slots]
    for layout, a in zip(case.layouts, case.a, strict=True):
        for slot, value in ((1, float("nan")), (-2, float("nan"))):
            a[layout.row_slots == slot] = value  # the adapter's own rows; those that are free
    case.x[4, 7] = float("inf")
    ill[4] = True
    actual = case.run(GatheredKernels(), force)
    for row, is_ill in enumerate(ill):
        assert is_ill or torch.equal(actual[row], sound[row]), row
    assert actual[2].isnan().any()
    assert actual[4].isnan().any()


def test_huge_values_overflow_only_for_their_own_rows() -> None:
    case = Case.make([0, 1, 2], 8, torch.bfloat16)
    sound = case.run(GatheredKernels(), "one product")
    case.a[:, case.layouts[0].row_slots == 1] = 3e38
    case.b[0][case.layouts[0].row_slots == 1] = 3e38
    actual = case.run(GatheredKernels(), "one product")
    assert torch.equal(actual[[0, 2]], sound[[0, 2]])
    assert not actual[1].isfinite().all()


@EVERY_KERNEL
def test_what_was_prepared_for_other_rows_or_pools_is_refused(kernels: Kernels) -> None:
    """Or rows would get another's delta, or none, or a native kernel would leave its memory."""
    case = Case.make([-1, 0, 1, 1], 8, torch.float32)
    prepared = kernels.prepare(4, segments_of(case.slots), CPU)
    for rows in (3, 5):
        with pytest.raises(ValueError, match="in a step of 4"):
            kernels.add(case.y.repeat(2, 1)[:rows], case.x.repeat(2, 1)[:rows], case.pools, prepared)
        with pytest.raises(ValueError, match="in a step of 4"):
            kernels.add(case.y.repeat(2, 1)[:rows], case.x, case.pools, prepared)
    longer = kernels.prepare(4, [SlotSegment(1, 5, 0)], CPU)
    with pytest.raises(ValueError, match="leaves the step"):
        kernels.add(case.y, case.x, case.pools, longer)
    first, count = case.layouts[0].ranges[1]
    end = first + count - 1
    small = LowRankPools(case.a[:, :end].contiguous(), [b[:end] for b in case.b], case.columns, case.layouts)
    with pytest.raises(ValueError, match="rank rows of the pool"):
        kernels.add(case.y, case.x, small, kernels.prepare(4, segments_of(case.slots), CPU))


def test_nothing_to_do_changes_nothing() -> None:
    case = Case.make([-1, -1, -1], 8, torch.float32)
    for kernels in (GatheredKernels(), ReferenceKernels()):
        assert torch.equal(case.run(kernels), case.y)


def test_the_cheaper_way_is_chosen() -> None:
    def chosen(slots: list[int], rank: int) -> GatheredPlan:
        case = Case.make(slots, rank, torch.float32)
        prepared = GatheredKernels().prepare(len(slots), segments_of(slots), CPU)
        plan = prepared.plans(case.y, case.x, case.pools)[0]
        assert plan is not None
        return plan

    assert chosen(list(range(16)), 8).drop is not None  # decode: one row each
    assert chosen([0] * 2000 + [1] * 2000 + [2] * 2000, 64).drop is None  # prefill: many rows each


def test_deterministic_servers_use_the_reference() -> None:
    assert isinstance(select_kernels(deterministic=True, device=CPU, dtype=torch.float32), ReferenceKernels)
    fast = GatheredKernels if find_native() is None else NativeKernels
    assert isinstance(select_kernels(deterministic=False, device=CPU, dtype=torch.bfloat16), fast)
    assert isinstance(select_kernels(deterministic=False, device=CPU, dtype=torch.float16), GatheredKernels)


@EVERY_KERNEL
def test_inputs_and_outputs_that_are_not_of_the_pools_are_refused(kernels: Kernels) -> None:
    case = Case.make([-1, 0, 1, 1], 8, torch.float32)
    prepared = kernels.prepare(4, segments_of(case.slots), CPU)
    for y, x in (
        (case.y.bfloat16(), case.x), (case.y, case.x.bfloat16()), (case.y, case.x[:, 1:]), (case.y[:, 1:], case.x),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="for pools of"):
            kernels.add(y.contiguous(), x.contiguous(), case.pools, prepared)


def test_pools_that_do_not_fit_each_other_are_refused() -> None:
    case = Case.make([0, 1], 8, torch.float32)
    for changed in (
        {"a": case.a[:2]},
        {"b": [b.bfloat16() for b in case.b]},
        {"b": [b[:-1] for b in case.b]},
        {"b": [b.T.contiguous().T for b in case.b]},
        {"columns": [(0, 41), *case.columns[1:]]},
        {"a": case.a.transpose(1, 2).contiguous().transpose(1, 2)},
    ):
        with pytest.raises(ValueError, match="pool"):
            LowRankPools(**{"a": case.a, "b": case.b, "columns": case.columns, "rank_rows": case.layouts, **changed})

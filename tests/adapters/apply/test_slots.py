"""Slots on the device: what is written where, what is refused, what the layouts say while adapters come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.apply.batch import AdapterBatch, RowMap
from loramux_adapters.apply.inject import AdaptedModel, inject, rank_row_bytes
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import load_base
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.kernels.gathered import GatheredKernels
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.part import Part
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.weights import AdapterWeights, ModuleWeights
from support.adapters import files_of
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.parts import fill_slot

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
CAPACITY = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(wide_model("qwen2"), tmp_path_factory.mktemp("slots") / "base")


def adapted_of(checkpoint: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    return inject(load_base(checkpoint, compute_dtype=dtype), capacity=CAPACITY)


@pytest.fixture(scope="module")
def weights(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterWeights:
    out = tmp_path_factory.mktemp("adapter") / "a"
    path = make_adapter_for(
        checkpoint, out, seed=1, r=5, target_modules=["q_proj", "v_proj", "embed_tokens"], bias="all"
    )
    return read(files_of(path), load_base(checkpoint, compute_dtype=torch.float32).spec, ReadLimits())


def table_of(adapted: AdaptedModel) -> SlotTable:
    return SlotTable(adapted.linears, CAPACITY, 8, 1 << 24)


def changed(weights: AdapterWeights, name: str, new: Part) -> AdapterWeights:
    """With `new` in place of the part of its kind."""
    others = tuple(part for part in weights.modules[name].parts if type(part) is not type(new))
    return AdapterWeights(weights.spec, {**weights.modules, name: ModuleWeights((*others, new))})


def pools_of(adapted: AdaptedModel) -> list[Any]:
    return [group.parts.of(LowRank) for group in adapted.groups]


def pools_are_finite(adapted: AdaptedModel) -> bool:
    return all(
        bool(t.isfinite().all())
        for group in adapted.groups
        for t in (group.parts.of(LowRank).a, *group.parts.of(LowRank).b)
    )


def test_written_rows_hold_the_factors_and_zeros(checkpoint: Path, weights: AdapterWeights) -> None:
    adapted = adapted_of(checkpoint)
    for group in adapted.groups:
        group.parts.of(LowRank).a.fill_(3)
    table = table_of(adapted)
    number, rows = table.try_take(table.needs(weights.spec.ranks), 0) or (-1, {})
    fill_slot(SlotTensors(adapted), number, weights, rows)
    group, member = adapted.linears[V]
    first, count = rows[V]
    low_rank = weights.modules[V].get(LowRank)
    assert low_rank is not None
    assert count == 8
    assert torch.equal(group.parts.of(LowRank).a[member, first : first + 5], low_rank.a)
    assert torch.equal(group.parts.of(LowRank).b[member][first : first + 5], low_rank.b.T)
    assert not group.parts.of(LowRank).a[member, first + 5 : first + 8].any()
    assert (group.parts.of(LowRank).a[member, first + 8 :] == 3).all()


@pytest.mark.parametrize("factor", ["a", "b"])
def test_values_beyond_the_dtype_are_refused_and_reach_no_pool(
    checkpoint: Path, weights: AdapterWeights, factor: str
) -> None:
    """A foreign rank row of B meets zero in a pool product, and 0 * inf is NaN for everybody."""
    adapted = adapted_of(checkpoint, torch.float16)
    low_rank = weights.modules[V].get(LowRank)
    assert low_rank is not None
    huge = getattr(low_rank, factor).clone()
    huge.view(-1)[7] = 1e6  # finite in float32, infinite in float16
    broken = LowRank(**{"a": low_rank.a, "b": low_rank.b, factor: huge})
    table, slots = table_of(adapted), SlotTensors(adapted)
    number, rows = table.try_take(table.needs(weights.spec.ranks), 0) or (-1, {})
    with pytest.raises(AdapterIncompatible, match=f"{V}.*not finite in float16.*--dtype float32") as refused:
        slots.prepare(changed(weights, V, broken))
    assert refused.value.subject == V
    assert pools_are_finite(adapted)
    fill_slot(slots, number, weights, rows)


@pytest.mark.parametrize("part", ["bias", "embedding"])
def test_so_are_those_outside_the_rank_rows(checkpoint: Path, weights: AdapterWeights, part: str) -> None:
    adapted = adapted_of(checkpoint, torch.float16)
    slots = SlotTensors(adapted)
    if part == "embedding":
        name = "model.embed_tokens"
        low_rank = weights.modules[name].get(LowRank)
        assert low_rank is not None
        broken = changed(weights, name, LowRank(low_rank.a, low_rank.b * 1e8))
    else:
        name = Q
        broken = changed(weights, name, Bias(torch.full((128,), 1e6)))
    with pytest.raises(AdapterIncompatible, match="not finite"):
        slots.prepare(broken)


def test_a_written_slot_is_used_by_nobody_before_it_is_bound(checkpoint: Path, weights: AdapterWeights) -> None:
    adapted = adapted_of(checkpoint)
    table, slots = table_of(adapted), SlotTensors(adapted)
    number, rows = table.try_take(table.needs(weights.spec.ranks), 0) or (-1, {})
    ids = torch.arange(6)[None]

    def logits(slot: int) -> torch.Tensor:
        kernels = GatheredKernels()
        batch = AdapterBatch(*(RowMap([slot] * 6, kernels, torch.device("cpu")) for _ in range(2)))
        with torch.inference_mode(), adapted.cell.running(batch):
            return adapted.model(ids, use_cache=False).logits

    base = logits(-1)
    adapter = slots.prepare(weights)
    for _ in slots.copy(number, adapter, rows):
        assert torch.equal(logits(number), base)
    slots.bind(number, adapter)
    assert not torch.allclose(logits(number), base, atol=1e-2)
    assert torch.equal(logits(-1), base)
    slots.unbind(number)
    assert torch.equal(logits(number), base)


def test_modules_whose_slots_lie_alike_share_a_layout(checkpoint: Path, weights: AdapterWeights) -> None:
    adapted = adapted_of(checkpoint)
    table, slots = table_of(adapted), SlotTensors(adapted)
    empty = {layout for group in adapted.groups for layout in group.parts.of(LowRank).rank_rows}
    for _ in range(3):
        number, rows = table.try_take(table.needs(weights.spec.ranks), 0) or (-1, {})
        fill_slot(slots, number, weights, rows)
    layouts = {layout for group in adapted.groups for layout in group.parts.of(LowRank).rank_rows}
    assert {len(layout.ranges) for layout in layouts} == {0, 3}
    places = [adapted.linears[name] for name in weights.spec.ranks if "proj" in name]
    targets = {group.parts.of(LowRank).rank_rows[member] for group, member in places}
    assert len(targets) == 1
    for number in sorted(table.numbers):
        slots.unbind(number)
        table.free(number)
    assert all(not layout.ranges for group in adapted.groups for layout in group.parts.of(LowRank).rank_rows)
    assert len(empty) == 1  # shared by all


def test_extra_bytes_count_what_lies_outside_the_rank_rows(checkpoint: Path, weights: AdapterWeights) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rank_rows, extra = SlotTensors(adapted_of(checkpoint, dtype)).cost(weights)
        assert rank_rows == {name: rank for name, rank in weights.spec.ranks.items() if name != "model.embed_tokens"}
        biases = sum(
            bias.value.numel() for module in weights.modules.values() if (bias := module.get(Bias)) is not None
        )
        assert biases > 0
        assert extra == (5 * (320 + 128) + biases) * dtype.itemsize


def test_rank_row_bytes_is_what_a_row_takes(checkpoint: Path) -> None:
    adapted = adapted_of(checkpoint, torch.bfloat16)
    held = (
        sum(
            tensor.numel()
            for group in adapted.groups
            for tensor in (group.parts.of(LowRank).a, *group.parts.of(LowRank).b)
        )
        * 2
    )
    assert held == CAPACITY * rank_row_bytes(adapted.spec, torch.bfloat16)


def test_an_adapter_of_biases_only_takes_no_rows(checkpoint: Path, weights: AdapterWeights) -> None:
    adapted = adapted_of(checkpoint)
    table, slots = table_of(adapted), SlotTensors(adapted)
    spec = replace(weights.spec, ranks={})
    only = AdapterWeights(spec, {Q: ModuleWeights((Bias(torch.ones(128)),))})
    number, rows = table.try_take(table.needs(spec.ranks), slots.cost(only)[1]) or (-1, {})
    fill_slot(slots, number, only, rows)
    group, member = adapted.linears[Q]
    own = group.frozen.bias
    assert own is not None
    begin, end = group.columns[member]
    torch.testing.assert_close(group.parts.of(Bias).values[member][number] + own[begin:end], torch.ones(128))
    slots.unbind(number)
    assert not group.parts.of(Bias).values[member]

"""Bottlenecks at a sub-layer: their arithmetic in float64, their cost, and bits that depend on a row alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.protocol import SlotSegment
from loramux_adapters.parts.bottleneck import ACTIVATIONS, KIND, Bottleneck, BottleneckForm, Bottlenecks
from loramux_adapters.parts.part import Share
from loramux_adapters.parts.rank_rows import RankRowsTable
from loramux_adapters.parts.site import Product, Site
from support.parts import numbers

WIDTH, UNITS = 96, 13


@dataclass
class Rows:
    """The rows of a step, as a part sees them."""

    segments: list[SlotSegment]
    has_virtual_ids = False
    changes_inputs = False

    def add_low_rank(self, *_: object) -> None:
        raise AssertionError


def make_parts(dtype: torch.dtype = torch.float32, *, is_invariant: bool = False) -> Bottlenecks:
    multiply = invariant.linear if is_invariant else F.linear

    def make_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return lambda x: multiply(x, weight, bias)

    cpu = torch.device("cpu")
    parts = KIND.at(
        Site(
            "sublayer", ("layers.0.mlp_output",), ((0, WIDTH),), WIDTH, dtype, cpu, None, RankRowsTable(8, cpu),
            make_product=make_product, is_invariant=is_invariant,
        )
    )  # fmt: skip
    assert isinstance(parts, Bottlenecks)
    return parts


def make_part(form: BottleneckForm, *, norms: bool = False, seed: int = 0) -> Bottleneck:
    norm = torch.stack([1 + numbers(WIDTH, seed=seed + 4), numbers(WIDTH, seed=seed + 5)])
    return Bottleneck(
        form,
        numbers(UNITS, WIDTH, seed=seed) / 8,  # no activation is saturated
        numbers(UNITS, seed=seed + 1),
        numbers(WIDTH, UNITS, seed=seed + 2),
        numbers(WIDTH, seed=seed + 3),
        norm if norms else None,
        norm.flip(1) if norms else None,
    )


def bind(parts: Bottlenecks, slot: int, part: Bottleneck) -> None:
    parts.write(slot, 0, part, parts.prepare(0, part), None)
    parts.bind(slot)


def in_double(part: Bottleneck, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        return x if own is None else F.layer_norm(x, (WIDTH,), own[0].double(), own[1].double())

    form, y, residual = part.form, y.double(), residual.double()
    sources = {"output": y, "residual": residual, "sum": y + residual}
    units = F.linear(norm(sources[form.reads], part.norm_before), part.down.double(), part.down_bias.double())
    change = F.linear(ACTIVATIONS[form.activation](units), part.up.double(), part.up_bias.double())
    shortcut = sources[form.shortcut]
    whole = change + shortcut if form.shortcut_in_norm else change
    whole = norm(whole, part.norm_after) + (0 if form.shortcut_in_norm else shortcut)
    return whole if form.keeps_residual else whole - residual


FORMS = {
    "pfeiffer": BottleneckForm("relu", "sum"),
    "houlsby": BottleneckForm("silu"),
    "parallel": BottleneckForm("gelu", "residual"),
    "twice": BottleneckForm("tanh", "sum", "sum"),
    "normed": BottleneckForm("gelu_tanh", "sum", "sum", shortcut_in_norm=True, keeps_residual=False),
    "without": BottleneckForm("sigmoid", keeps_residual=False),
}


@pytest.mark.parametrize("is_invariant", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_each_segment_has_its_own(name: str, is_invariant: bool) -> None:
    parts = make_parts(is_invariant=is_invariant)
    plain, normed = make_part(FORMS[name]), make_part(FORMS[name], norms=True, seed=10)
    bind(parts, 3, plain)
    bind(parts, 5, normed)
    y, residual = numbers(70, WIDTH, seed=1), numbers(70, WIDTH, seed=2)
    changed = y.clone()
    segments = [SlotSegment(4, 7, 1), SlotSegment(7, 50, 3), SlotSegment(50, 70, 5)]
    parts.after(changed, [residual], Rows(segments))
    assert torch.equal(changed[:7], y[:7])
    for part, rows in ((plain, slice(7, 50)), (normed, slice(50, 70))):
        expected = in_double(part, y[rows], residual[rows])
        torch.testing.assert_close(changed[rows].double(), expected, atol=1e-3, rtol=1e-4)
    parts.unbind(3)
    again = y.clone()
    parts.after(again, [residual], Rows(segments))
    assert torch.equal(again[:50], y[:50])
    assert parts.has(5)
    assert not parts.has(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_invariant_row_is_the_same_bits_in_every_segment(activation: str, dtype: torch.dtype) -> None:
    parts = make_parts(dtype, is_invariant=True)
    bind(parts, 0, make_part(BottleneckForm(activation, "sum"), norms=True))
    y, residual = numbers(70, WIDTH, seed=1).to(dtype), numbers(70, WIDTH, seed=2).to(dtype)
    together = y.clone()
    parts.after(together, [residual], Rows([SlotSegment(0, 70, 0)]))
    for start, stop in ((0, 1), (31, 32), (5, 40), (69, 70), (33, 70)):
        alone = y[start:stop].clone()
        parts.after(alone, [residual[start:stop]], Rows([SlotSegment(0, stop - start, 0)]))
        assert torch.equal(alone, together[start:stop]), (start, stop)


@pytest.mark.parametrize("is_invariant", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_the_cost_is_what_is_copied(is_invariant: bool, norms: bool) -> None:
    parts = make_parts(torch.bfloat16, is_invariant=is_invariant)
    part = make_part(FORMS["houlsby"], norms=norms)
    cost = parts.cost(part)
    assert cost.rank_rows == 0
    assert cost.nbytes == sum(tensor.numel() * 2 for tensor in parts.prepare(0, part))


BEYOND: dict[str, Callable[[Bottleneck], torch.Tensor]] = {
    "down": lambda part: part.down, "up_bias": lambda part: part.up_bias,
}  # fmt: skip


@pytest.mark.parametrize("which", BEYOND)
def test_values_beyond_the_compute_dtype_are_refused(which: str) -> None:
    part = make_part(FORMS["houlsby"])
    BEYOND[which](part).mul_(1e30)
    with pytest.raises(
        AdapterIncompatible, match=r"layers\.0\.mlp_output: the scaled weights are not finite in float16"
    ):
        make_parts(torch.float16).prepare(0, part)


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby", "parallel"])
def test_units_of_several_add_by_their_weights(form: str) -> None:
    parts = make_parts()
    shares = [Share(make_part(FORMS[form]), 0.7), Share(make_part(FORMS[form], seed=10), -0.4)]
    bind(parts, 0, combined(shares))
    y, residual = numbers(20, WIDTH, seed=1), numbers(20, WIDTH, seed=2)
    changed = y.clone()
    parts.after(changed, [residual], Rows([SlotSegment(0, 20, 0)]))
    expected = y.double()
    for share in shares:
        expected = expected + share.weight * (in_double(share.part, y, residual) - y.double())
    torch.testing.assert_close(changed.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", ["twice", "normed", "without"])
def test_what_replaces_the_output_has_no_sum(form: str) -> None:
    assert KIND.combine([Share(make_part(FORMS[form]), 0.5)]) is None


def test_forms_that_differ_or_have_norms_have_no_sum() -> None:
    one = Share(make_part(FORMS["houlsby"]), 1.0)
    assert KIND.combine([one, Share(make_part(FORMS["pfeiffer"]), 1.0)]) is None
    assert KIND.combine([one, Share(make_part(FORMS["houlsby"], norms=True), 1.0)]) is None


def combined(shares: list[Share[Bottleneck]]) -> Bottleneck:
    part = KIND.combine(shares)
    assert isinstance(part, Bottleneck)
    return part

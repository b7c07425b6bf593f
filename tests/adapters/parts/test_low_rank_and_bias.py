"""Low rank and bias at one module, side by side with others in one batch, against the formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from support.parts import PartsBench, fill_slot, numbers

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")


@pytest.fixture
def bench(tmp_path: Path) -> PartsBench:
    return PartsBench(tmp_path)


def test_each_row_gets_its_own_adapter_and_base_rows_none(bench: PartsBench) -> None:
    weight, own = bench.frozen(Q)
    a, b, bias = numbers(5, weight.shape[1], seed=1), numbers(len(weight), 5, seed=2), numbers(len(weight), seed=3)
    both, biased = bench.bind({Q: [LowRank(a, b), Bias(bias)]}), bench.bind({Q: [Bias(2 * bias)]})
    x = numbers(6, weight.shape[1], seed=4)
    y = bench.run(Q, x, [-1, -1, both, both, biased, biased])
    plain = x.double() @ weight.T
    torch.testing.assert_close(y[:2].double(), plain[:2] + own, atol=1e-4, rtol=1e-5)
    low_rank = x.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(y[2:4].double(), (plain + low_rank + bias)[2:4], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(y[4:].double(), (plain + 2 * bias)[4:], atol=1e-4, rtol=1e-5)
    bench.free(both)
    assert torch.equal(bench.run(Q, x, [-1] * 6), bench.run(Q, x, [both] * 6))


def test_merged_weights_are_the_same(bench: PartsBench) -> None:
    width = bench.frozen(Q)[0].shape[1]
    parts = {
        Q: [LowRank(numbers(4, width, seed=1), numbers(len(bench.frozen(Q)[0]), 4, seed=2))],
        K: [Bias(numbers(len(bench.frozen(K)[0]), seed=3))],
        OUT: [Bias(numbers(len(bench.frozen(OUT)[0]), seed=4))],  # the base has none there
    }
    slot = bench.bind(parts)
    for name in (Q, K, OUT):
        x = numbers(3, bench.frozen(name)[0].shape[1], seed=5)
        torch.testing.assert_close(
            bench.run_merged(name, x, parts), bench.run(name, x, [slot] * 3), atol=1e-4, rtol=1e-5
        )


def test_a_failed_copy_leaves_nothing_for_the_next_of_its_slot(
    bench: PartsBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = bench.frozen(Q)
    biases = {name: [Bias(numbers(len(bench.frozen(name)[0]), seed=1))] for name in (Q, K, OUT)}
    at, _ = bench.adapted.sites[OUT]

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(at.of(Bias), "write", fail)
        with pytest.raises(MemoryError):
            fill_slot(bench.slots, 0, bench.weights({Q: biases[Q], OUT: biases[OUT]}), {})
    bench.slots.unbind(0)
    fill_slot(bench.slots, 0, bench.weights({K: biases[K]}), {})  # a sibling: its parts are kept with those of q
    x = numbers(2, weight.shape[1], seed=3)
    assert torch.equal(bench.run(Q, x, [0, 0]), bench.run(Q, x, [-1, -1]))
    assert not torch.allclose(bench.run(K, x, [0, 0]), bench.run(K, x, [-1, -1]), atol=1e-2)


def test_a_kind_is_refused_where_it_has_no_meaning(bench: PartsBench) -> None:
    embedding = "model.embed_tokens"
    with pytest.raises(AdapterIncompatible, match="Bias has no meaning for a module of kind embedding") as refused:
        bench.slots.cost(bench.weights({embedding: [Bias(numbers(4, seed=1))]}))
    assert refused.value.subject == embedding


def test_a_kind_that_no_row_has_is_asked_at_no_module(bench: PartsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = bench.frozen(Q)
    slot = bench.bind({Q: [LowRank(numbers(4, weight.shape[1], seed=1), numbers(len(weight), 4, seed=2))]})
    biased = bench.bind({Q: [Bias(numbers(len(weight), seed=3))]})
    at, _ = bench.adapted.sites[Q]
    asked: list[object] = []
    monkeypatch.setattr(at.of(Bias), "after", lambda *seen: asked.append(seen))
    x = numbers(2, weight.shape[1], seed=4)
    bench.run(Q, x, [-1, slot])
    assert not asked
    bench.run(Q, x, [slot, biased])
    assert len(asked) == 1


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_not_the_steps_are_refused_where_an_adapter_acts(bench: PartsBench, rows: int) -> None:
    """As by a module that a model runs on a part of the rows: they would get another adapter's part, or none."""
    weight, _ = bench.frozen(Q)
    low_rank = LowRank(numbers(4, weight.shape[1], seed=1), numbers(len(weight), 4, seed=2))
    x = numbers(rows, weight.shape[1], seed=3)
    for parts in ([low_rank], [Bias(numbers(len(weight), seed=4))]):
        slot = bench.bind({Q: parts})
        with pytest.raises(ValueError, match=f"q_proj: {rows} rows in a step of 3"):
            bench.run(Q, x, [-1, slot, slot])
        elsewhere = numbers(rows, bench.frozen(OUT)[0].shape[1], seed=5)
        plain = bench.run(OUT, elsewhere, [-1] * rows)
        assert torch.equal(bench.run(OUT, elsewhere, [-1, slot, slot]), plain)
    embedding = "model.embed_tokens"
    table = bench.adapted.spec.modules[embedding]
    low_rank = LowRank(numbers(2, table.in_features, seed=6), numbers(table.out_features, 2, seed=7))
    slot = bench.bind({embedding: [low_rank]})
    with pytest.raises(ValueError, match=f"embed_tokens: {rows} rows in a step of 3"):
        bench.run(embedding, torch.arange(rows), [-1, slot, slot])

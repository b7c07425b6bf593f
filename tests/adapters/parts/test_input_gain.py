"""Input gain at one module, beside other kinds, siblings and other adapters, against the formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.parts.input_gain import InputGain
from loramux_adapters.parts.low_rank import LowRank
from support.parts import PartsBench, numbers

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")  # siblings: one product of one input
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def bench(tmp_path: Path) -> PartsBench:
    return PartsBench(tmp_path)


@pytest.mark.parametrize("name", [Q, DOWN])
def test_the_module_reads_the_scaled_input(bench: PartsBench, name: str) -> None:
    weight, own = bench.frozen(name)
    outputs, inputs = weight.shape
    a, b, gain = numbers(5, inputs, seed=1), numbers(outputs, 5, seed=2), numbers(inputs, seed=3)
    both, plain = bench.bind({name: [LowRank(a, b), InputGain(gain)]}), bench.bind({name: [LowRank(b=b, a=2 * a)]})
    x = numbers(6, inputs, seed=4)
    given = x.clone()
    y = bench.run(name, x, [-1, -1, both, both, plain, plain]).double()
    assert torch.equal(x, given)
    delta = a.double().T @ b.double().T
    scaled = x.double() * gain
    torch.testing.assert_close(y[:2], (x.double() @ weight.T + own)[:2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(y[2:4], (scaled @ (weight.T + delta) + own)[2:4], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(y[4:], (x.double() @ (weight.T + 2 * delta) + own)[4:], atol=1e-3, rtol=1e-5)
    merged = bench.run_merged(name, x, {name: [LowRank(a, b), InputGain(gain)]})
    torch.testing.assert_close(merged, bench.run(name, x, [both] * 6), atol=1e-3, rtol=1e-5)


def test_siblings_keep_their_own_input(bench: PartsBench) -> None:
    weight, own = bench.frozen(K)
    a, b = numbers(4, weight.shape[1], seed=1), numbers(len(weight), 4, seed=2)
    gained = bench.bind({Q: [InputGain(numbers(weight.shape[1], seed=3))], K: [LowRank(a, b)]})
    x = numbers(4, weight.shape[1], seed=4)
    y = bench.run(K, x, [-1, gained, gained, gained]).double()
    expected = x.double() @ weight.T + own
    expected[1:] += (x.double() @ a.double().T @ b.double().T)[1:]
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)

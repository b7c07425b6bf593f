"""Output gain at one module, beside other kinds and other adapters, against the formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.parts.output_gain import OutputGain
from support.parts import PartsBench, numbers

Q, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qo")  # with and without a bias of the base's own


@pytest.fixture
def bench(tmp_path: Path) -> PartsBench:
    return PartsBench(tmp_path)


@pytest.mark.parametrize("name", [Q, OUT])
def test_the_gain_is_of_all_but_the_bias(bench: PartsBench, name: str) -> None:
    weight, own = bench.frozen(name)
    outputs, inputs = weight.shape
    a, b = numbers(5, inputs, seed=1), numbers(outputs, 5, seed=2)
    gain, bias = numbers(outputs, seed=3), numbers(outputs, seed=4)
    alone, all_kinds = [OutputGain(gain)], [Bias(bias), OutputGain(2 * gain), LowRank(a, b)]
    one, other = bench.bind({name: alone}), bench.bind({name: all_kinds})
    x = numbers(7, inputs, seed=5)
    y = bench.run(name, x, [-1, -1, one, one, one, other, other]).double()
    plain, low_rank = x.double() @ weight.T, x.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(y[:2], (plain + own)[:2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(y[2:5], (gain * plain + own)[2:5], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(y[5:], (2 * gain * (plain + low_rank) + bias)[5:], atol=1e-3, rtol=1e-5)
    for parts, slot in ((alone, one), (all_kinds, other)):
        merged = bench.run_merged(name, x, {name: parts})
        torch.testing.assert_close(merged, bench.run(name, x, [slot] * 7), atol=1e-3, rtol=1e-5)


def test_a_slot_that_is_freed_has_no_gain(bench: PartsBench) -> None:
    weight, _ = bench.frozen(Q)
    slot = bench.bind({Q: [OutputGain(numbers(len(weight), seed=1))]})
    x = numbers(3, weight.shape[1], seed=2)
    assert not torch.allclose(bench.run(Q, x, [slot] * 3), bench.run(Q, x, [-1] * 3), atol=1e-2)
    bench.free(slot)
    again = bench.bind({Q: [Bias(bench.frozen(Q)[1].float())]})
    assert again == slot
    assert torch.equal(bench.run(Q, x, [again] * 3), bench.run(Q, x, [-1] * 3))

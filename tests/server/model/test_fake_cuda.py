"""Whole steps on a fake CUDA device: no operation mixes devices, and what a GPU would pay for may only fall.

`fake_cuda_budgets.json` beside this file holds what each mix of work may cost. Nothing is computed here; that a step's
numbers are right is for the other tests.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.fake_cuda import budgets, guard
from support.processes import run_in_threads

pytestmark = pytest.mark.skipif(guard.why_unavailable() is not None, reason=str(guard.why_unavailable()))

COUNTED = {
    "x.T.reshape(-1)[3:]; x + x; (x @ x.T).relu_()": (4, 0, 0),
    "torch.tensor([1, 2], device='cuda')": (0, 1, 0),
    "x.copy_(torch.ones(4, 8))": (0, 1, 0),
    "x.copy_(torch.ones(4, 8), non_blocking=True)": (0, 1, 0),
    "assert x.tolist() == [[0] * 8] * 4": (0, 0, 1),
    "assert bool((x > 0).any())": (2, 0, 1),
    "x.cpu(); x.cpu().tolist()": (0, 0, 2),
    "assert not x.nonzero().tolist()": (0, 0, 2),
    "torch.ones(3).sum().item(); torch.ones(2).tolist()": (0, 0, 0),
}
MISMATCHED = ("x + torch.ones(4, 8)", "x @ torch.ones(8, 2)", "torch.cat([x, torch.ones(1, 8)])")
LEDGER = """
import json, sys
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from support.fake_cuda import guard
from support.fake_cuda.ledger import counting

guard.load()
found = {}
for code in json.loads(sys.argv[1]):
    with counting(FakeTensorMode(allow_non_fake_inputs=True), nn.ModuleList()) as ledger:
        x = torch.empty(4, 8, device="cuda")
        try:
            exec(code)
            found[code] = (ledger.kernels.total(), ledger.to_device.total(), ledger.syncs.total())
        except RuntimeError as error:
            found[code] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """By mix; in a process of its own, for the device guard stays in the one that loads it."""
    found: dict[str, Any] = json.loads(run_in_threads(1, "from support.fake_cuda.__main__ import main; main([])"))
    return found


@pytest.mark.parametrize("mix", budgets.read())
def test_what_a_step_costs_on_a_gpu_may_only_fall(measured: dict[str, Any], mix: str) -> None:
    budget = budgets.read()[mix]
    grown = budgets.risen(budget, measured[mix])
    assert not grown, "\n".join([mix, *grown, f"If it is worth it: {budgets.UPDATE} --raise"])
    assert budgets.is_current(budget, measured[mix]), f"{mix}: costs fell or moved; {budgets.UPDATE}"


def test_every_mix_has_a_budget(measured: dict[str, Any]) -> None:
    assert measured.keys() == budgets.read().keys()


def test_the_ledger_counts_and_finds_tensors_of_two_devices() -> None:
    found = json.loads(run_in_threads(1, LEDGER, json.dumps([*COUNTED, *MISMATCHED])))
    assert {code: tuple(found[code]) for code in COUNTED} == COUNTED
    for code in MISMATCHED:
        assert "device" in found[code], code


def test_a_rise_is_told_by_function_and_line() -> None:
    budget = {"kernels_per_layer": 2.0, "kernels": 5, "to_device": 1, "syncs": 1, "at": {"a.py f": {"kernels": 5}}}
    same = budget | {"lines": {"a.py:3": {"kernels": 5}}}
    assert budgets.risen(budget, same) == []
    assert budgets.is_current(budget, same)
    more = same | {"kernels": 6, "at": {"a.py f": {"kernels": 6}}, "lines": {"a.py:3": {"kernels": 6}, "b.py:1": {}}}
    assert budgets.risen(budget, more) == [
        "kernels rose from 5 to 6",
        "  a.py f: kernels rose from 5 to 6",
        "  a.py:3: {'kernels': 6}",
    ]
    moved = same | {"at": {"a.py g": {"kernels": 5}}}
    assert budgets.risen(budget, moved) == []
    assert not budgets.is_current(budget, moved)
    assert not budgets.is_current(budget, same | {"kernels": 4})

"""Methods that act between steps: AdaLoRA's ranks against PEFT's, and GaLore against the algorithm on plain weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats.peft.writer import write_files
from loramux_trainer.data.examples import Example
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.member import Member
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.methods.adalora import Budget, adalora
from loramux_trainer.methods.galore import galore
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from support.fleets import (
    dequantize,
    examples_of,
    lora_config,
    make_member,
    peft_in_float64,
    summed_loss,
    torch_optimizer,
    various_units,
)
from support.tiny import load_tiny

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))
RATE = 0.03
BUDGET = Budget(first=6, last=2, warm=2, final=3, every=2, total=12)


def _mean_loss(model: FleetModel, adapter: TrainedAdapter, examples: Sequence[Example]) -> None:
    """Forward and backward of one step, the penalty included."""
    parts = adapter.parts(with_gradients=True)
    with model.running([MemberRows(parts, tuple(examples), 0)]) as hidden:
        loss, _ = model.token_loss(hidden, torch.full((len(hidden.targets),), 1.0 / len(hidden.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    parts.backward()


@pytest.mark.filterwarnings("ignore")
def test_adalora_prunes_as_peft_does(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, tmp_path: Path) -> None:
    examples = examples_of(tokenizer, TEXTS)
    method = adalora(
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], "lora_alpha": 8},
        0,
        BaseValues(fleet_base),
        BUDGET,
    )
    adapter = TrainedAdapter(method, fleet_base.spec, fleet_base.device)
    peft = peft_in_float64(adapter, fleet_base, load_tiny().model, tmp_path)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    tokens = sum(example.supervised for example in examples)
    for step in range(1, BUDGET.total + 1):
        _mean_loss(model, adapter, examples)
        adapter.parameters.weights.sub_(adapter.parameters.gradients, alpha=RATE)
        adapter.after_step(step)
        adapter.parameters.clear()

        (summed_loss(peft, examples) / tokens).backward()  # with its penalty, which a forward adds to its mean loss
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(parameter.grad, alpha=RATE)
            peft.base_model.update_and_allocate(step)
            for parameter in trained:
                parameter.grad = None
    views = adapter.parameters.views
    for name in {view.rpartition(":")[0] for view in views}:
        layer = peft.base_model.model.get_submodule(name)
        ours, theirs = views[f"{name}:e"], layer.lora_E["default"].detach().float()
        assert torch.equal(ours == 0, theirs == 0), name
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)
    zeros = sum(int((view == 0).sum()) for name, view in views.items() if name.endswith(":e"))
    modules = sum(name.endswith(":e") for name in views)
    assert zeros == modules * (BUDGET.first - BUDGET.last)


def test_galore_is_the_algorithm_on_plain_weights(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, tmp_path: Path
) -> None:
    """Ten steps over four periods, with a momentum of the projected gradient that outlives them; and the file says the
    same. (Adam would make a lot of the last bits of float32.)
    """
    scale, rank, gap, steps, rate = 0.25, 3, 3, 10, 0.1
    units = various_units(tokenizer, 6)
    said: list[str] = []
    config = lora_config(rank, lora_alpha=scale * rank, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    method = galore(config, 0, gap=gap, rank_budget=64, tell=said.append)
    member = make_member(fleet_base, units, method=method, steps=steps, batch_size=6, rate=rate)
    member.options = replace(member.options, max_grad_norm=None)
    member.optimizer = torch_optimizer(torch.optim.SGD, member.adapter.parameters.groups, momentum=0.9)
    fleet = Fleet(model, token_budget=4096)
    fleet.admit(member)
    for _ in range(steps):
        fleet.step()
    adapter = member.adapter
    assert isinstance(adapter, TrainedAdapter)
    written, tensors = adapter.files()
    assert written["r"] == rank * -(-steps // gap)
    assert not said

    plain = load_tiny().model
    dequantize(plain)
    torch.nn.Module.to(plain, torch.float64)
    names = sorted({name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for name in tensors})
    weights = {name: plain.get_submodule(name).weight for name in names}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    states = {name: _Projected(rank, scale) for name in names}
    examples = [unit.rows[0] for unit in units]
    tokens = sum(example.supervised for example in examples)
    for step in range(steps):
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        (summed_loss(plain, examples) / tokens).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(states[name].update(weight.grad, is_new=step % gap == 0), alpha=rate)
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        ours, exact = scale * b @ a, (weights[name] - start[name]).detach().float()
        assert exact.abs().max() > 1e-4
        assert float(torch.dist(ours, exact) / exact.norm()) < 1e-3, name

    write_files(
        tmp_path,
        written | {"base_model_name_or_path": "base"},
        tensors,
        fleet_base.spec.fingerprint,
        weights_file=adapter.layout.weights_file,
    )
    fresh = load_tiny().model
    dequantize(fresh)
    theirs = summed_loss(PeftModel.from_pretrained(fresh, str(tmp_path)).double(), examples)
    rows = MemberRows(adapter.parts(with_gradients=False), tuple(examples), 0)
    with torch.no_grad(), model.running([rows]) as hidden:
        ours = -model.log_probs(hidden).sum()
    torch.testing.assert_close(float(ours), float(theirs.detach()), rtol=1e-5, atol=0)


class _Projected:
    """GaLore's projector on one weight, as in its authors' code, and a momentum."""

    def __init__(self, rank: int, scale: float) -> None:
        self._rank, self._scale = rank, scale
        self._momentum: torch.Tensor | None = None

    def update(self, gradient: torch.Tensor, *, is_new: bool) -> torch.Tensor:
        if is_new:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            self._right = gradient.shape[0] >= gradient.shape[1]
            basis = vh[: self._rank] if self._right else u[:, : self._rank].T
            signs = [1.0 if row[row.abs().argmax()] > 0 else -1.0 for row in basis]
            basis = basis * torch.tensor(signs)[:, None]
            self._basis = basis if self._right else basis.T
        low = gradient @ self._basis.T if self._right else self._basis.T @ gradient
        self._momentum = low if self._momentum is None else 0.9 * self._momentum + low
        return self._scale * (self._momentum @ self._basis if self._right else self._basis @ self._momentum)


def test_galore_over_its_rank_budget_compresses_and_says_so(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    said: list[str] = []
    config = lora_config(3, lora_alpha=0.75, target_modules=["v_proj", "gate_proj"])
    method = galore(config, 0, gap=1, rank_budget=8, tell=said.append)
    member = make_member(fleet_base, various_units(tokenizer, 6), method=method, steps=5, batch_size=6)
    fleet = Fleet(model, token_budget=4096)
    fleet.admit(member)
    while fleet.running:
        fleet.step()
    assert said
    assert all("of its energy" in message for message in said)
    assert isinstance(member.adapter, TrainedAdapter)
    assert member.adapter.files()[0]["r"] <= 8


def test_the_state_of_both_is_restored(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    """A member that goes on from its tensors has the bits of one that was never stopped."""
    units = various_units(tokenizer, 8)
    config = lora_config(3, lora_alpha=0.75, target_modules=["v_proj", "gate_proj"])
    linear = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "lora_alpha": 8}

    def members() -> list[Member]:
        methods = {
            "galore": galore(config, 0, gap=2, rank_budget=9, tell=print),
            "adalora": adalora(linear, 0, BaseValues(fleet_base), BUDGET),
        }
        return [make_member(fleet_base, units, name=name, method=each, steps=7) for name, each in methods.items()]

    for whole, first, second in zip(members(), members(), members(), strict=True):
        for member, steps in ((whole, 7), (first, 5)):
            fleet = Fleet(model, token_budget=4096)
            fleet.admit(member)
            for _ in range(steps):
                fleet.step()
        second.restore(first.step, first.tensors())
        fleet = Fleet(model, token_budget=4096)
        fleet.admit(second)
        while fleet.running:
            fleet.step()
        assert second.step == whole.step == 7
        assert torch.equal(second.adapter.parameters.weights, whole.adapter.parameters.weights)
        assert isinstance(whole.adapter, TrainedAdapter)
        assert isinstance(second.adapter, TrainedAdapter)
        for one, other in zip(whole.adapter.files()[1].values(), second.adapter.files()[1].values(), strict=True):
            assert torch.equal(one, other)

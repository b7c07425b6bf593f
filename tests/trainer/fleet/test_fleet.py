"""Members of a fleet against the same members alone: the same bits in deterministic mode, whatever the others do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase, refingerprint
from loramux_trainer.errors import DeviceFull
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.member import Member
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.losses.dpo import DpoLoss
from loramux_trainer.losses.kto import KtoLoss
from loramux_trainer.losses.orpo import OrpoLoss
from loramux_trainer.losses.protocol import Loss
from loramux_trainer.methods import low_rank, prompts, vectors
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues
from support.fleets import ALL_LINEAR, lora_config, make_member, various_units

STEPS = 10
LINEAR = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}


def _members(base: LoadedBase, tokenizer: Any, steps: int = STEPS) -> list[Member]:
    """Twelve: ranks 1 to 64, seven methods, four losses, three optimizers, dropout, different lengths."""
    values = BaseValues(base)
    prompt = {"task_type": "CAUSAL_LM", **prompts.sizes(4, base.spec, of_keys=False)}
    kinds: list[tuple[Method, Loss | None, type[torch.optim.Optimizer]]] = [
        (low_rank.lora(lora_config(1), 0, values), None, torch.optim.AdamW),
        (low_rank.lora(lora_config(2), 1, values), None, torch.optim.SGD),
        (low_rank.lora(lora_config(4), 2, values), DpoLoss(0.1, "sigmoid", 0.0), torch.optim.AdamW),
        (low_rank.lora(lora_config(8), 3, values), KtoLoss(512), torch.optim.NAdam),
        (low_rank.lora(lora_config(8, use_dora=True), 4, values), None, torch.optim.AdamW),
        (low_rank.lora(lora_config(16, use_rslora=True), 5, values), None, torch.optim.AdamW),
        (low_rank.lora(lora_config(64), 6, values), None, torch.optim.AdamW),
        (low_rank.lora(lora_config(40), 7, values), DpoLoss(0.1, "sigmoid", 0.0), torch.optim.SGD),
        (vectors.ia3({**LINEAR, "feedforward_modules": ["down_proj"]}, 8), None, torch.optim.AdamW),
        (low_rank.vera({**LINEAR, "r": 16}, 9), OrpoLoss(0.1), torch.optim.AdamW),
        (prompts.prompt(prompt, 10), None, torch.optim.AdamW),
        (low_rank.loha({**LINEAR, "r": 3, "alpha": 6}, 11), None, torch.optim.AdamW),
    ]  # fmt: skip
    members = []
    for index, (method, loss, optimizer) in enumerate(kinds):
        name = "sft" if loss is None else loss.name
        units = various_units(tokenizer, 18 + index, pairs=name in ("dpo", "orpo"), labels=name == "kto")
        members.append(
            make_member(
                base,
                units,
                name=f"m{index}",
                method=method,
                loss=loss,
                optimizer=optimizer,
                steps=steps,
                seed=index,
                dropout=0.1 * (index % 2),
                batch_size=2 + index % 2,
                accumulation=1 + (index % 3 == 0),
                chunk_tokens=256,
            )
        )
    return members


def _run(model: FleetModel, *members: Member, budget: int = 1024) -> Fleet:
    fleet = Fleet(model, token_budget=budget)
    for member in members:
        fleet.admit(member)
    while fleet.running:
        fleet.step()
    return fleet


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twelve_different_members_get_the_bits_of_their_runs_alone(
    deterministic: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """With one that is admitted at step 5, and one that diverges at step 3."""
    members = _members(fleet_base, tokenizer)
    *early, late = members
    fleet = Fleet(deterministic, token_budget=1024)
    for member in early:
        fleet.admit(member)
    for step in range(STEPS + 5):
        if step == 5:
            fleet.admit(late)
        if step == 2:
            members[1].adapter.parameters.weights.mul_(1e30)
        fleet.step()
    assert [member.state for member in members] == ["finished", "diverged", *["finished"] * 10]
    assert members[1].step == 2
    assert "not finite" in str(members[1].failure) or "nan" in str(members[1].failure)
    for index, solo in enumerate(_members(fleet_base, tokenizer)):
        if index == 1:
            continue
        _run(deterministic, solo, budget=400)
        assert torch.equal(solo.adapter.parameters.weights, members[index].adapter.parameters.weights), index
    assert refingerprint(fleet_base) == fleet_base.spec.fingerprint


def test_in_the_fast_mode_the_difference_stays_rounding(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """Of gradients, relative to the largest: 2e-5 was measured. Adam makes more of it, which is no bound."""
    fused = _members(fleet_base, tokenizer, steps=1)
    gradients = _first_gradients(model, fused)
    for solo, ours in zip(_members(fleet_base, tokenizer, steps=1), gradients, strict=True):
        (alone,) = _first_gradients(model, [solo])
        torch.testing.assert_close(ours, alone, atol=5e-5 * float(alone.abs().max()), rtol=0)


def _first_gradients(model: FleetModel, members: list[Member]) -> list[torch.Tensor]:
    """Of the first step, as the optimizers are given them."""
    seen: dict[str, torch.Tensor] = {}
    for member in members:
        member.optimizer = _Recorder(member, seen)
    _run(model, *members)
    return [seen[member.name] for member in members]


class _Recorder:
    """An optimizer that only looks."""

    def __init__(self, member: Member, seen: dict[str, torch.Tensor]) -> None:
        self._member, self._seen = member, seen

    def step(self, rate: float) -> None:
        self._seen[self._member.name] = self._member.adapter.parameters.gradients.clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    needs_hessian = False

    def give_hessian(self, estimates: object) -> None: ...
    def restore(self, tensors: object) -> None: ...


def test_a_member_that_diverges_keeps_the_weights_it_had(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    sound, broken = (
        make_member(fleet_base, various_units(tokenizer, 9), name=name, steps=3) for name in ("sound", "broken")
    )
    fleet = Fleet(model, token_budget=2048)
    fleet.admit(sound)
    fleet.admit(broken)
    assert fleet.step().keys() == {"sound", "broken"}
    broken.optimizer.step = lambda rate: broken.adapter.parameters.weights.fill_(float("inf"))  # type: ignore[method-assign]
    before = broken.adapter.parameters.weights.clone()
    assert fleet.step().keys() == {"sound"}
    assert broken.state == "diverged"
    assert torch.equal(broken.adapter.parameters.weights, before)
    assert fleet.step().keys() == {"sound"}
    assert sound.state == "finished"
    assert not fleet.running


def test_evaluation_changes_nothing_and_is_the_mean_over_tokens(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    units = various_units(tokenizer, 8)
    member = make_member(fleet_base, units[:5], name="a", held_out=units[5:], dropout=0.5)
    without = make_member(fleet_base, units, name="b")
    fleet = Fleet(model, token_budget=100)
    fleet.admit(member)
    fleet.admit(without)
    fleet.step()
    before = member.adapter.parameters.weights.clone()
    reports = fleet.evaluate(fleet.members)
    assert reports.keys() == {"a"}
    assert reports["a"].step == 1
    assert torch.equal(member.adapter.parameters.weights, before)
    assert not member.adapter.parameters.gradients.any()
    fleet.token_budget = 4096
    assert fleet.evaluate([member])["a"].loss == pytest.approx(reports["a"].loss, rel=1e-5)


def test_out_of_memory_halves_the_micro_batch_and_says_so(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = various_units(tokenizer, 12)
    plain, short = (make_member(fleet_base, units, steps=1, batch_size=12, rate=1e-2) for _ in range(2))
    _run(model, plain)
    said: list[str] = []
    running = model.running

    def limited(members: Any) -> Any:
        if sum(len(each.ids) for rows in members for each in rows.sequences) > 300:
            raise torch.OutOfMemoryError("no room")
        return running(members)

    monkeypatch.setattr(model, "running", limited)
    fleet = Fleet(model, token_budget=1024, warn=said.append)
    fleet.admit(short)
    fleet.step()
    assert short.state == "finished"
    assert said
    assert all("out of memory" in message for message in said)
    assert fleet.token_budget <= 300
    torch.testing.assert_close(short.adapter.parameters.weights, plain.adapter.parameters.weights, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(model, "running", _raise(torch.OutOfMemoryError("no room")))
    fleet.admit(make_member(fleet_base, units, name="another"))
    with pytest.raises(DeviceFull):
        fleet.step()


def _raise(error: Exception) -> Callable[..., Any]:
    def raising(*_: object) -> Any:
        raise error

    return raising


def test_two_members_of_one_name_are_refused(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    fleet = Fleet(model, token_budget=512)
    member = make_member(fleet_base, various_units(tokenizer, 4))
    fleet.admit(member)
    with pytest.raises(ValueError, match="has a member"):
        fleet.admit(make_member(fleet_base, various_units(tokenizer, 4)))
    fleet.release(member)
    assert fleet.step() == {}

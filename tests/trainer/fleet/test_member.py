"""What a step of a member is: by tokens of the whole step, its own masks, and its own reference."""

import copy
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_trainer.errors import CheckpointInvalid
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.member import Member
from loramux_trainer.fleet.model import FleetModel
from loramux_trainer.losses.dpo import DpoLoss
from support.fleets import make_member, various_units


def _step(model: FleetModel, member: Member, budget: int = 4096) -> float:
    fleet = Fleet(model, token_budget=budget)
    fleet.admit(member)
    return fleet.step()[member.name].loss


def test_accumulation_and_cuts_change_nothing(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    """Eight units of different lengths at once, in four micro-batches, or cut by tokens."""
    units = various_units(tokenizer, 8)
    found = []
    for batch_size, accumulation, chunk_tokens in ((8, 1, 4096), (2, 4, 4096), (8, 1, 60)):
        member = make_member(
            fleet_base,
            units,
            batch_size=batch_size,
            accumulation=accumulation,
            chunk_tokens=chunk_tokens,
            optimizer=torch.optim.SGD,
            rate=1.0,
        )
        loss = _step(model, member)
        found.append((loss, member.adapter.parameters.weights.clone()))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(weights, found[0][1], atol=2e-5, rtol=1e-4)


def test_masks_are_of_a_seed_a_step_and_a_chunk(fleet_base: LoadedBase, tokenizer: Any) -> None:
    units = various_units(tokenizer, 4)
    first, other = (make_member(fleet_base, units, seed=seed) for seed in (1, 2))
    keys = {first.dropout_key(0), first.dropout_key(1), other.dropout_key(0)}
    first.step += 1
    assert len(keys | {first.dropout_key(0)}) == 4
    first.step -= 1
    assert first.dropout_key(0) in keys


def test_the_reference_is_the_base(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    """A fresh adapter is the base, so that its first loss is log 2; later ones are not. Computed once or at each step,
    a reference is the same."""
    units = various_units(tokenizer, 6, pairs=True)
    members = [make_member(fleet_base, units, loss=DpoLoss(0.5, "sigmoid", 0.0), batch_size=6) for _ in "ab"]
    Fleet(model, token_budget=300).precompute_reference(members[1])
    assert members[1].reference is not None
    assert torch.cat(members[1].reference.of(range(6), torch.device("cpu"))).isfinite().all()
    losses = []
    for member in members:
        fleet = Fleet(model, token_budget=4096)
        fleet.admit(member)
        losses.append([fleet.step()[member.name].loss for _ in range(3)])
    assert losses[0][0] == pytest.approx(0.6931, abs=1e-3)
    assert abs(losses[0][2] - 0.6931) > 0.01
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_checkpoint_of_another_member_is_refused(fleet_base: LoadedBase, tokenizer: Any) -> None:
    units = various_units(tokenizer, 4)
    small, large = (make_member(fleet_base, units, rank=rank) for rank in (2, 4))
    state = copy.deepcopy(small.tensors())
    with pytest.raises(CheckpointInvalid, match="not those of this job"):
        large.restore(1, state)
    small.restore(20, state)
    assert small.state == "finished"

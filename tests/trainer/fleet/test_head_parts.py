"""Members with parts at the output head: their bits are those of their runs alone, dropout acts there, and a head that
is tied to the embedding has its trained rows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.guard.examine import examine
from loramux_trainer.data.examples import IGNORE, Example
from loramux_trainer.fleet.fleet import Fleet
from loramux_trainer.fleet.head import CHUNK
from loramux_trainer.fleet.member import Member
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.losses.dpo import DpoLoss
from loramux_trainer.losses.orpo import OrpoLoss
from loramux_trainer.losses.protocol import Loss
from loramux_trainer.losses.sft import SftLoss
from loramux_trainer.methods import low_rank
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from support.checkpoints import save_checkpoint, wide_model
from support.fleets import jitter, lora_config, make_member, peft_in_float64, summed_loss, various_units

TOKENS = list(range(3, 130, 2))
HEAD: dict[str, Any] = {"target_modules": ["lm_head"]}


def _members(base: LoadedBase, tokenizer: Any) -> list[Member]:
    values = BaseValues(base)
    configs: list[dict[str, Any]] = [
        lora_config(8, target_modules=["q_proj"]),
        lora_config(4, target_modules=["lm_head", "q_proj"]),
        lora_config(4, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS[::2]}),
        lora_config(4, use_dora=True, **HEAD),
    ]
    return [
        make_member(
            base,
            various_units(tokenizer, 20 + index, pairs=index == 3),
            name=f"m{index}",
            method=low_rank.lora(config, index, values),
            loss=DpoLoss() if index == 3 else None,
            steps=2,
            seed=index,
            dropout=0.2 * (index % 2),
            batch_size=10,
        )
        for index, config in enumerate(configs)
    ]


def _run(model: FleetModel, *members: Member) -> None:
    fleet = Fleet(model, token_budget=4096)
    for member in members:
        fleet.admit(member)
    while fleet.running:
        fleet.step()


def test_their_bits_are_those_of_their_runs_alone(
    deterministic: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """Chunks of logits would else end elsewhere in company."""
    members = _members(fleet_base, tokenizer)
    rows = [sum(each.supervised for chunk in m.chunks() for unit in chunk.units for each in unit.rows) for m in members]
    assert max(rows[:3]) < CHUNK < sum(rows[:3])
    _run(deterministic, *members)
    for index, solo in enumerate(_members(fleet_base, tokenizer)):
        _run(deterministic, solo)
        assert torch.equal(solo.adapter.parameters.weights, members[index].adapter.parameters.weights), index


def test_dropout_acts_on_what_the_head_reads(model: FleetModel, fleet_base: LoadedBase, tokenizer: Any) -> None:
    units = various_units(tokenizer, 6)
    members = [
        make_member(
            fleet_base,
            units,
            name=str(dropout),
            method=low_rank.lora(lora_config(4, **HEAD), 0, BaseValues(fleet_base)),
            steps=1,
            dropout=dropout,
        )
        for dropout in (0.0, 0.5)
    ]
    _run(model, *members)
    without, dropped = (member.adapter.parameters.weights for member in members)
    assert not torch.equal(without, dropped)


@pytest.mark.parametrize("loss", [SftLoss(), DpoLoss(), OrpoLoss(0.1)], ids=lambda loss: loss.name)
def test_a_head_alone_learns_by_every_loss(
    loss: Loss, model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """Below it nothing has gradients."""
    units = various_units(tokenizer, 6, pairs=loss.name != "sft")
    method = low_rank.lora(lora_config(4, **HEAD), 0, BaseValues(fleet_base))
    member = make_member(fleet_base, units, method=method, loss=loss, steps=1)
    _run(model, member)
    assert member.adapter.parameters.views["lm_head:b"].any()


@pytest.mark.filterwarnings("ignore")  # PEFT's remarks
def test_rows_of_tokens_of_a_tied_base_have_gradients_from_both_ends(tmp_path: Path) -> None:
    source = save_checkpoint(wide_model("llama", tie_word_embeddings=True), tmp_path / "base")
    base = load_base(source, compute_dtype=torch.float32)
    config = lora_config(2, trainable_token_indices=TOKENS, target_modules=["q_proj"])
    adapter = TrainedAdapter(low_rank.lora(config, 0, BaseValues(base)), base.spec, base.device)
    jitter(adapter)
    ids = tuple((7 * place) % 140 for place in range(40))
    example = Example(ids, (IGNORE, *ids[1:]))
    parts = adapter.parts(with_gradients=True)
    with FleetModel(base, examine(base, 64)) as model, model.running([MemberRows(parts, (example,), 0)]) as hidden:
        loss, _ = model.token_loss(hidden, torch.ones(len(hidden.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    parts.backward()
    [group] = [group for group in adapter.parameters.groups if group.role == "embedding"]
    assert group.flat.grad is not None

    peft = peft_in_float64(adapter, base, load_base(source, compute_dtype=torch.float32).model, tmp_path / "adapter")
    exact = summed_loss(peft, [example])
    exact.backward()
    torch.testing.assert_close(float(loss.detach()), float(exact.detach()), rtol=1e-6, atol=0)
    [theirs] = {id(p): p.grad for name, p in peft.named_parameters() if "trainable_tokens_delta" in name}.values()
    ours = group.flat.grad.view(len(TOKENS), -1).double()
    torch.testing.assert_close(ours, theirs, atol=4e-5 * float(theirs.abs().max()), rtol=0)

"""What members train at the output head: the same gradients from every loss, dropout, and rows that a tied base has
there too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import LoadedBase, load_base
from loramux_adapters.guard.examine import examine
from loramux_trainer.examples import IGNORE, Example
from loramux_trainer.fleet import head
from loramux_trainer.fleet.model import FleetModel, MemberRows
from loramux_trainer.fleet.rows import Dropout
from loramux_trainer.methods import low_rank
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from support.architectures import save_small
from support.fleets import examples_of, jitter, lora_config, peft_in_float64, summed_loss

TEXTS = (("lantern", "a light"), ("a somewhat longer question", "yes"), ("x", "a long answer to a short question"))
AT_HEAD = {"task_type": "CAUSAL_LM", "target_modules": ["lm_head"]}
METHODS: dict[str, Callable[[BaseValues], Method]] = {
    "lora": lambda values: low_rank.lora(lora_config(target_modules=["lm_head"]), 0, values),
    "dora": lambda values: low_rank.lora(lora_config(target_modules=["lm_head"], use_dora=True), 0, values),
    "loha-dense": lambda _: low_rank.loha({**AT_HEAD, "r": 12, "alpha": 6}, 0),
}


def _gradients(
    model: FleetModel,
    adapter: TrainedAdapter,
    rows: list[tuple[Example, ...]],
    *,
    by_log_probs: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Of the last of `rows`, the others without an adapter."""
    adapter.parameters.clear()
    parts = adapter.parts(with_gradients=True)
    members = [MemberRows(None, each, -1) for each in rows[:-1]]
    members.append(MemberRows(parts, rows[-1], 0, adapter.virtual_tokens, dropout))
    with model.running(members) as hidden:
        own = hidden.part(sum(len(each) for each in rows[:-1]), len(hidden.counts))
        if by_log_probs:
            loss = -model.log_probs(own).sum()
        else:
            loss, _ = model.token_loss(own, torch.ones(len(own.targets)))
        loss.backward()  # type: ignore[no-untyped-call]
    parts.backward()
    return adapter.parameters.gradients.clone()


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_gives_the_same_gradients_at_the_head(
    name: str, model: FleetModel, fleet_base: LoadedBase, tokenizer: Any
) -> None:
    """Losses of log-probabilities see the head first in a forward without gradients."""
    adapter = TrainedAdapter(METHODS[name](BaseValues(fleet_base)), fleet_base.spec, fleet_base.device)
    jitter(adapter)
    rows = [tuple(examples_of(tokenizer, TEXTS))]
    ours, other = (_gradients(model, adapter, rows, by_log_probs=way) for way in (False, True))
    assert ours.any()
    torch.testing.assert_close(other, ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


def test_dropout_acts_at_the_head_and_by_the_member_s_own_rows(
    model: FleetModel, fleet_base: LoadedBase, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks wherever the logits are cut into chunks."""
    adapter = TrainedAdapter(METHODS["lora"](BaseValues(fleet_base)), fleet_base.spec, fleet_base.device)
    jitter(adapter)
    examples = tuple(examples_of(tokenizer, TEXTS))
    dropout = Dropout(0.5, "key")
    plain = _gradients(model, adapter, [examples])
    whole = _gradients(model, adapter, [examples], dropout=dropout)
    largest = float(plain.abs().max())
    assert float((whole - plain).abs().max()) > 0.05 * largest
    monkeypatch.setattr(head, "CHUNK", 7)
    for by_log_probs in (False, True):
        cut = _gradients(model, adapter, [examples[:1], examples], dropout=dropout, by_log_probs=by_log_probs)
        torch.testing.assert_close(cut, whole, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
@pytest.mark.parametrize("by_log_probs", [False, True])
@pytest.mark.filterwarnings("ignore")  # PEFT's remarks
def test_trained_rows_of_a_tied_base_act_at_its_head_too(architecture: str, by_log_probs: bool, tmp_path: Path) -> None:
    """As PEFT computes them, and as the server does; a scaled embedding (Gemma's) has rows of its own scale."""
    save_small(architecture, tmp_path / "base")
    base, plain = (load_base(str(tmp_path / "base"), compute_dtype=torch.float32) for _ in range(2))
    assert base.spec.tied_embeddings
    ids = [tuple((7 * i + j) % base.spec.vocab_size for j in range(6 + 3 * i)) for i in range(4)]
    examples = tuple(Example(each, (IGNORE, IGNORE, *each[2:])) for each in ids)
    names = sorted({name.rpartition(".")[2] for name, each in base.spec.modules.items() if each.kind != "norm"})
    linear = [name for name in names if name in ("c_attn", "c_proj", "q_proj", "down_proj")]
    options = {"fan_in_fan_out": architecture == "gpt2", "trainable_token_indices": [5, 17]}
    with FleetModel(base, examine(base, 64)) as model:
        method = low_rank.lora(lora_config(target_modules=linear, **options), 0, BaseValues(base))
        adapter = TrainedAdapter(method, base.spec, base.device)
        jitter(adapter)
        _gradients(model, adapter, [examples], by_log_probs=by_log_probs)
    exact = peft_in_float64(adapter, base, plain.model, tmp_path / "adapter")
    summed_loss(exact, examples).backward()
    (theirs,) = [p.grad for name, p in exact.named_parameters() if "token_adapter" in name and p.grad is not None]
    (group,) = [group for group in adapter.parameters.groups if group.role == "embedding"]
    (ours,) = group.gradients.values()
    torch.testing.assert_close(ours.double(), theirs, atol=4e-5 * float(theirs.abs().max()), rtol=0)

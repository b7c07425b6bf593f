"""Loss and gradients against trl's own trainers on the batches that these made, for each loss and loss type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.validation import ValuesInvalid, read
from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.losses.protocol import Totals
from loramux_trainer.losses.reference import PrecomputedReference
from loramux_trainer.losses.select import build_loss
from loramux_trainer.schema.loss_config import LOSS_TYPES, LossConfig
from support.log_probs import log_probs, small_llama

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="trl, whose losses are compared with, is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of trl and datasets
]

PAIRS = [
    {"prompt": "two plus two is ", "chosen": "four", "rejected": "a long wrong answer"},
    {"prompt": "say ", "chosen": "the word", "rejected": "certainly not"},
    {"prompt": "a longer prompt than the others ", "chosen": "yes, it is", "rejected": "maybe"},
    {"prompt": "x", "chosen": "y", "rejected": "zz"},
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair, side in zip(PAIRS, ("chosen", "rejected", "rejected", "chosen"), strict=True)
]
CPU = torch.device("cpu")
MAX_LENGTH = 40  # a prompt with another's answer is longer


@pytest.fixture
def tokenizer(tokenizer: Any) -> Any:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return {
        "output_dir": str(tmp_path / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "max_length": MAX_LENGTH,
    }


def _compare(trainer: Any, inputs: Any, units: list[Unit], config: LossConfig, reference: Any) -> None:
    """One step of ours in two chunks, but for KTO, whose divergence is of the chunk, against one of trl's."""
    model = trainer.model
    theirs = trainer.compute_loss(model, inputs)
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = build_loss(config, max_length=MAX_LENGTH)
    chunks = [units] if config.name == "kto" else [units[:1], units[1:]]
    totals = sum(map(loss.totals, chunks), Totals())
    total = torch.zeros(())
    for chunk in chunks:
        rows = loss.rows(chunk)
        with torch.no_grad():
            base = log_probs(reference, rows) if loss.needs_reference else None
        value, _ = loss.value(log_probs(model, rows), base, chunk, totals)
        value.backward()
        total += value.detach()
    torch.testing.assert_close(total, theirs.detach(), atol=1e-5, rtol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3, "nothing to compare"
    for name, parameter in model.named_parameters():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * scale, rtol=0, msg=name)


def _examples(inputs: Mapping[str, torch.Tensor], mask: str = "completion_mask", prefix: str = "") -> list[Example]:
    """The rows of a batch of trl's."""
    examples = []
    columns = (inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", mask))
    for ids, real, answer in zip(*columns, strict=True):
        kept, learned = ids[real == 1], answer[real == 1] == 1
        examples.append(Example(tuple(kept.tolist()), tuple(torch.where(learned, kept, IGNORE).tolist())))
    return examples


def _pairs(rows: list[Example]) -> list[Unit]:
    half = len(rows) // 2
    return [Unit(pair) for pair in zip(rows[:half], rows[half:], strict=True)]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kind", LOSS_TYPES["dpo"])
def test_dpo(kind: str, beta: float, tokenizer: Any, arguments: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    smoothing = {"robust": 0.1, "exo_pair": 0.001}.get(kind)
    policy, reference = small_llama(len(tokenizer), 1), small_llama(len(tokenizer), 2)
    options = DPOConfig(**arguments, loss_type=[kind], beta=beta, label_smoothing=smoothing or 0.0)
    trainer = DPOTrainer(policy, reference, options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    units = _pairs(_examples(inputs))
    _compare(trainer, inputs, units, LossConfig("dpo", kind, beta, smoothing), reference)


def test_dpo_with_a_precomputed_reference(tokenizer: Any, arguments: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, base = small_llama(len(tokenizer), 1), small_llama(len(tokenizer), 2)
    options = DPOConfig(**arguments, precompute_ref_log_probs=True)
    trainer = DPOTrainer(policy, base, options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    units = _pairs(_examples(inputs))
    reference = PrecomputedReference([len(unit.rows) for unit in units])
    with torch.no_grad():
        for index, unit in enumerate(units):
            reference.put(index, log_probs(base, unit.rows))
    theirs = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1).flatten()
    order = [2, 0, 1, 3]
    torch.testing.assert_close(torch.cat(reference.of(order, CPU)).view(4, 2), theirs.view(4, 2)[order])
    loss = build_loss(LossConfig("dpo", precompute_ref_log_probs=True), max_length=MAX_LENGTH)
    value, _ = loss.value(log_probs(policy, loss.rows(units)), reference.of(range(4), CPU), units, loss.totals(units))
    torch.testing.assert_close(value, trainer.compute_loss(policy, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
@pytest.mark.parametrize("kind", LOSS_TYPES["kto"])
@pytest.mark.parametrize("seeds", [(1, 2), (3, 4)])
def test_kto(
    kind: str, weights: tuple[float, float], seeds: tuple[int, int], tokenizer: Any, arguments: dict[str, Any]
) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference = (small_llama(len(tokenizer), seed) for seed in seeds)
    options = KTOConfig(**arguments, loss_type=kind, desirable_weight=weights[0], undesirable_weight=weights[1])
    trainer = KTOTrainer(
        policy, reference, options, train_dataset=Dataset.from_list(JUDGED), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    labels = [bool(label) for label in inputs["label"]]
    units = [Unit((row,), label) for row, label in zip(_examples(inputs), labels, strict=True)]
    config = LossConfig("kto", kind, None, None, *weights)
    if kind == "kto":
        mismatched = build_loss(config, max_length=MAX_LENGTH).rows(units)[len(units) :]
        assert list(mismatched) == _examples(inputs, prefix="KL_")
        assert max(len(row.ids) for row in mismatched) == MAX_LENGTH, "nothing is cut: the case would not notice"
    _compare(trainer, inputs, units, config, reference)


@pytest.mark.parametrize("beta", [None, 0.7])
def test_orpo(beta: float | None, tokenizer: Any, arguments: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = small_llama(len(tokenizer), 1)
    options = ORPOConfig(**arguments, **({} if beta is None else {"beta": beta}))
    trainer = ORPOTrainer(policy, options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    rows = []
    for side in ("chosen", "rejected"):
        answers = {"completion_mask": inputs[f"{side}_labels"] != IGNORE}
        rows += _examples({**{key: inputs[f"{side}_{key}"] for key in ("input_ids", "attention_mask")}, **answers})
    _compare(trainer, inputs, _pairs(rows), LossConfig("orpo", beta=beta), None)


@pytest.mark.parametrize("kind", LOSS_TYPES["sft"])
def test_sft(kind: str, tokenizer: Any, arguments: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    records = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    policy = small_llama(len(tokenizer), 1)
    options = SFTConfig(**arguments, loss_type=kind)
    trainer = SFTTrainer(policy, options, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    masked = {**inputs, "answer": inputs["labels"] != IGNORE}
    _compare(trainer, inputs, [Unit((row,)) for row in _examples(masked, "answer")], LossConfig("sft", kind), None)


@pytest.mark.parametrize("name", ["dpo", "kto", "sft"])
def test_every_loss_type_of_trl_is_computed_or_refused_by_its_name(name: str) -> None:
    import trl

    config = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "sft": trl.SFTConfig}[name]
    metadata = config.__dataclass_fields__["loss_type"].metadata
    theirs = set(metadata.get("choices") or re.findall(r"`'(\w+)'`", metadata["help"]))
    assert set(LOSS_TYPES[name]) <= theirs
    for kind in theirs - set(LOSS_TYPES[name]):
        with pytest.raises(ValuesInvalid, match=f"loss_type: of {name} must be one of .*{kind}"):
            read(LossConfig, {"name": name, "loss_type": kind})

"""Rows and masks against those of trl's trainers for the same records: text and conversations, pairs and labels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.data.records import parse_record
from loramux_trainer.data.units import encode_units
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import LossConfig
from support.log_probs import small_llama
from support.tiny import conversation, tiny_encoder

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="trl, whose rows are compared with, is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of trl and datasets
]

CHAT, OTHER = conversation("ab", "cd", system="ef"), conversation("ab", "much longer", system="ef")
TEXT_PAIRS = [{"prompt": "ab ", "chosen": "cd", "rejected": "efg"}, {"prompt": "x", "chosen": "y z", "rejected": "z"}]
CHAT_PAIRS = [
    {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": OTHER[2:]},
    {"prompt": [*CHAT, CHAT[1]], "chosen": OTHER[2:], "rejected": CHAT[2:]},
]
IMPLICIT = [{"chosen": CHAT, "rejected": OTHER}, {"chosen": [*CHAT, *OTHER[1:]], "rejected": [*CHAT, *CHAT[1:]]}]


def _arguments(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "max_length": 512,
    }


def _example(ids: list[int], learned: list[int]) -> Example:
    return Example(tuple(ids), tuple(i if yes else IGNORE for i, yes in zip(ids, learned, strict=True)))


def _answered(row: dict[str, Any], key: str) -> Example:
    prompt, answer = row["prompt_ids"], row[key]
    return _example(prompt + answer, [0] * len(prompt) + [1] * len(answer))


def _ours(records: list[Any], loss: Any, tokenizer: Any, **options: Any) -> list[Unit]:
    data, encoder = DataConfig(Path("t"), **options), tiny_encoder(tokenizer)
    return [unit for record in records for unit in encode_units(parse_record(record), encoder, data, LossConfig(loss))]


@pytest.mark.parametrize("records", [TEXT_PAIRS, CHAT_PAIRS, IMPLICIT], ids=["text", "messages", "implicit"])
def test_pairs(records: list[Any], tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        small_llama(len(tokenizer), 1),
        small_llama(len(tokenizer), 2),
        DPOConfig(**_arguments(tmp_path)),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    theirs = [Unit((_answered(row, "chosen_ids"), _answered(row, "rejected_ids"))) for row in trainer.train_dataset]
    assert _ours(records, "dpo", tokenizer) == theirs


@pytest.mark.parametrize("records", [TEXT_PAIRS, CHAT_PAIRS], ids=["text", "messages"])
@pytest.mark.parametrize("paired", [True, False])
def test_labels(records: list[Any], paired: bool, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    if not paired:
        records = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in records
            for side in ("chosen", "rejected")
        ]
    trainer = KTOTrainer(
        small_llama(len(tokenizer), 1),
        small_llama(len(tokenizer), 2),
        KTOConfig(**_arguments(tmp_path)),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    theirs = [Unit((_answered(row, "completion_ids"),), row["label"]) for row in trainer.train_dataset]
    assert set(_ours(records, "kto", tokenizer)) == set(theirs)
    assert len(theirs) == 4


TURNS = {"messages": [*CHAT, *OTHER[1:]]}


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"prompt": "ab ", "completion": "cd"}, {}),
        ({"prompt": "ab ", "completion": "cd"}, {"completion_only_loss": False}),
        ({"prompt": "ab ", "completion": "cd"}, {"completion_only_loss": True}),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, {}),
        (TURNS, {"assistant_only_loss": True}),
        (TURNS, {"assistant_only_loss": False}),
        ({"text": "abc"}, {}),
    ],
)
def test_answers(record: Any, options: dict[str, bool], tokenizer: Any, tmp_path: Path) -> None:
    """Without an option, and with messages, trl learns all of a conversation: assistant_only_loss: false here."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        small_llama(len(tokenizer), 1),
        SFTConfig(**_arguments(tmp_path), **options),
        train_dataset=Dataset.from_list([record, record]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    [unit] = _ours([record], "sft", tokenizer, **options)
    assert unit.rows[0].ids == tuple(ids)
    assert unit.rows[0].labels[1:] == tuple(labels[1:])  # the first token is never predicted

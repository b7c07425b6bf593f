"""What people do with a trainer, as they write it: double quantization, large ranks, small good data, over-fitting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.load import load_base
from loramux_adapters.embedded.tiny import tiny_path
from loramux_trainer.demo_tasks import DEMO_TASKS, training_records
from loramux_trainer.fleet_run import FleetOutcome
from loramux_trainer.job import parse_job
from loramux_trainer.run import train, train_file
from support.kinds import KindOracle
from support.model_engine import ModelEngine
from support.tiny import write_jsonl
from support.training import job_file, job_values

PROMPT = [5, 60, 7, 101, 111, 114, 33, 90]
ROMAN = next(task for task in DEMO_TASKS if task.name == "roman")


def test_qlora_with_double_quantization_is_served_on_the_same_base(tmp_path: Path) -> None:
    """Training, serving and PEFT on the base whose scales are quantized too; it is not the plain one."""
    job = parse_job({**job_values(tmp_path), "bnb_4bit_use_double_quant": True})
    assert job.training.double_quant
    result = train(job)
    base = load_base(tiny_path(), compute_dtype=torch.float32, double_quant=True)
    assert result.base_fingerprint == base.spec.fingerprint
    assert result.base_fingerprint != load_base(tiny_path(), compute_dtype=torch.float32).spec.fingerprint
    model = load_base(tiny_path(), compute_dtype=torch.float32, double_quant=True).model
    truth = KindOracle(tiny_path(), job.output, model=model).truth("a", PROMPT, 3)
    engine = ModelEngine(base, {"a": job.output})
    ticket = engine.submit("a", PROMPT, 3)
    engine.run()
    assert engine.tokens(ticket) == truth.tokens
    for ours, theirs in zip(engine.logits(ticket), truth.logits, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-5 * float(theirs.std()), rtol=1e-4)


def test_rank_256_with_alpha_512_on_all_layers(tmp_path: Path) -> None:
    values = job_values(tmp_path)
    job = parse_job({**values, "lora": {"preset": "max-r256"}, "training": {**values["training"], "max_steps": 2}})
    train(job)
    config = json.loads((job.output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (256, 512)
    assert sorted(config["target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> FleetOutcome:
    """Roman numerals by five recipes in one fleet, all judged on the same held-out examples."""
    root = tmp_path_factory.mktemp("recipes")
    records = training_records(ROMAN)
    held_out, pool = records[:40], records[40:]
    answers = [record["messages"][1]["content"] for record in pool]
    random.Random(3).shuffle(answers)
    wrong = [
        {"messages": [record["messages"][0], {"role": "assistant", "content": answer}]}
        for record, answer in zip(pool, answers, strict=True)
    ]
    write_jsonl(root / "held_out.jsonl", held_out)
    write_jsonl(root / "good.jsonl", pool[:120])
    write_jsonl(root / "large.jsonl", [*pool[:120], *wrong[120:480]])
    write_jsonl(root / "few.jsonl", pool[:24])
    common: dict[str, Any] = {
        "model": "loramux-tiny",
        "output": str(root / "out"),
        "data": {"eval": str(root / "held_out.jsonl")},
        "lora": {"rank": 16, "alpha": 32},
        "training": {"learning_rate": 5e-3, "batch_size": 8, "max_steps": 45, "warmup_steps": 3, "eval_steps": 15},
    }
    long = {**common["training"], "max_steps": 90}
    guarded = {**long, "weight_decay": 0.5}
    jobs = [
        {"name": "small-good", "data": {"train": str(root / "good.jsonl")}},
        {"name": "large-bad", "data": {"train": str(root / "large.jsonl")}},
        {"name": "few", "data": {"train": str(root / "few.jsonl")}, "training": long},
        {"name": "guarded", "data": {"train": str(root / "few.jsonl")}, "training": guarded,
         "lora": {**common["lora"], "dropout": 0.3}},
    ]  # fmt: skip
    return train_file(job_file(common, jobs=jobs))


def _eval_losses(outcome: FleetOutcome, name: str) -> list[float]:
    report = json.loads((outcome.results[name].output / "train_report.json").read_text())
    return [each["loss"] for each in report["evals"]]


def test_a_small_good_set_beats_a_large_bad_one(learned: FleetOutcome) -> None:
    """A fifth of the examples, all of them right, against four times as many of which three quarters are wrong."""
    assert _eval_losses(learned, "small-good")[-1] < 0.8 * _eval_losses(learned, "large-bad")[-1]


def test_epochs_over_few_examples_are_over_fitted_and_the_evaluation_shows_it(learned: FleetOutcome) -> None:
    losses = _eval_losses(learned, "few")
    assert losses[-1] > 1.02 * min(losses)


def test_decay_and_dropout_hold_over_fitting_back(learned: FleetOutcome) -> None:
    assert _eval_losses(learned, "guarded")[-1] < _eval_losses(learned, "few")[-1]

"""Packed rows train as rows of their own: loss and gradient are those without packs. And a run on a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.export import REPORT
from loramux_trainer.job import TrainConfig
from loramux_trainer.run import train
from support.training import StopAt

JobMaker = Callable[..., TrainConfig]
ONE_STEP = {"max_steps": 1, "batch_size": 64, "gradient_accumulation_steps": 1, "warmup_steps": 0}
NO_DROPOUT = {"dropout": 0.0}


def test_packed_equals_unpacked(make_job: JobMaker) -> None:
    seen = {}
    for packing in (False, True):
        watcher = StopAt(10**9)
        data = {"packing": packing, "eval_fraction": 0, "max_length": 128}
        train(make_job(f"packed-{packing}", data=data, lora=NO_DROPOUT, training=ONE_STEP), progress=watcher)
        seen[packing] = watcher.seen[0]
    assert seen[True].tokens == seen[False].tokens
    assert seen[True].loss == pytest.approx(seen[False].loss, rel=1e-6)
    assert seen[True].gradient_norm == pytest.approx(seen[False].gradient_norm, rel=1e-5)


def test_a_run_takes_a_table_and_reports_what_it_was(make_job: JobMaker, tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer", "id"], *([f"q{i}", f"a{i}", i] for i in range(12))])
    options: dict[str, Any] = {"columns": {"prompt": "question", "completion": "answer"}, "ignore_columns": ["id"]}
    job = make_job(data={"train": "t.csv", "eval_fraction": 0, "packing": True, **options}, training={"max_steps": 1})
    result = train(job)
    assert (result.data.records, result.data.train, result.data.units) == (12, 12, 1)
    report = json.loads((job.output / REPORT).read_text())
    assert report["data"]["masked_share"] == result.data.masked_share > 0
    assert report["job"]["data"]["columns"] == options["columns"]

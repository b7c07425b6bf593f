"""Outputs that a run before this one has finished: whether they are this job's. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import TrainConfig, recorded_key

REPORT = "train_report.json"
"""Beside the adapter: how it was made."""


def has_adapter(output: Path) -> bool:
    """Whether an adapter is there, of whatever origin; an export writes its config last."""
    return (output / CONFIG_FILE).exists()


def read_finished(job: TrainConfig) -> Mapping[str, Any]:
    """The report of the adapter in the job's output. Raises JobInvalid where it is of another job, or of no run."""
    try:
        report: dict[str, Any] = json.loads((job.output / REPORT).read_text(encoding="utf-8"))
        made, wanted = recorded_key(report["job"]), job.reproducibility_key()
        model = report["job"]["model"]
        report["result"], report["data"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise JobInvalid("output", f"{job.output} already has an adapter; choose another directory") from None
    if model != job.model:
        raise _other(job, "model", model, job.model)
    for key, value in wanted.items():
        if made.get(key) != value:
            raise _other(job, key, made.get(key), value)
    return report


def check_data(job: TrainConfig, report: Mapping[str, Any], digest: str) -> None:
    """Raises JobInvalid where the finished adapter was trained on other data."""
    if report.get("training_data", digest) != digest:
        raise JobInvalid("output", f"{job.output} has an adapter of other training data; choose another directory")


def _other(job: TrainConfig, key: str, made: object, wanted: object) -> JobInvalid:
    return JobInvalid(
        "output",
        f"{job.output} has the adapter of another job ({key}: {made}, not {wanted}); choose another directory",
    )

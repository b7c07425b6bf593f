"""Whether the disk holds what a run will write, checked before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from loramux_trainer.checkpoints import CHECKPOINTS, list_checkpoints
from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import TrainConfig

_STATES = 3  # of every parameter in a checkpoint: itself and AdamW's two moments
_FLOAT = 4  # bytes
_TEXTS = 1 << 20  # report and metadata, roughly


def needed_bytes(job: TrainConfig, parameters: int, total_steps: int, existing: int) -> int:
    """What is written at most at a time: the checkpoints that are kept, one more beside them, and the adapter.

    `existing` checkpoints are on the disk already.
    """
    every = job.checkpoint.save_steps
    periodic = (total_steps - 1) // every if every else 0
    checkpoints = max(1, min(periodic, job.checkpoint.save_total_limit) + 1 - existing)
    states = _STATES + job.training.load_best_model_at_end  # the best weights beside the last ones
    return parameters * _FLOAT * (states * checkpoints + 1) + _TEXTS


def still_needed(job: TrainConfig, parameters: int, total_steps: int) -> int:
    """Bytes that the run still writes, besides what is on the disk already."""
    return needed_bytes(job, parameters, total_steps, len(list_checkpoints(job.output / CHECKPOINTS)))


def check_space(job: TrainConfig, parameters: int, total_steps: int, beside: Mapping[Path, int] | None = None) -> None:
    """Raises JobInvalid when the output's disk has too little room for the run. `beside`: output -> bytes that other
    runs still write.
    """
    disk = _disk(job.output)
    others = sum(count for output, count in (beside or {}).items() if _disk(output) == disk)
    needed, free = still_needed(job, parameters, total_steps) + others, _free_bytes(job.output)
    if free < needed:
        who = "the run and those beside it write" if others else "the run writes"
        raise JobInvalid(
            "output",
            f"{job.output} is on a disk with {free / 1e6:,.0f} MB free, and {who} up to "
            f"{needed / 1e6:,.0f} MB (checkpoints and the adapter): free some space, choose another disk, or lower "
            "checkpoint.save_total_limit",
        )


def _disk(directory: Path) -> int:
    return directory.stat().st_dev


def _free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free

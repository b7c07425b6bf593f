"""The rows of `loramux train --table`: what is compared, and the job that each of them is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import CheckpointConfig, TrainConfig
from loramux_trainer.planning.short_job import few_steps
from loramux_trainer.schema.adapter_config import LoraConfig
from loramux_trainer.schema.optim_config import OptimConfig
from loramux_trainer.schema.presets import QUERY_AND_VALUE

By = Literal["peft", "fleet"]
Adapted = Literal["query and value", "all linear"]

_TARGETS: Final = {"query and value": QUERY_AND_VALUE, "all linear": "all-linear"}
_ALPHA = 2.0  # times the rank
_ALL_RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Row:
    """One way to train the same examples. `bits` are those of a frozen weight; `by`: PEFT in a plain loop of torch's,
    or the fleet.
    """

    bits: Literal[16, 4]
    by: By
    adapted: Adapted
    rank: int
    optimizer: Literal["adamw", "sgd"] = "adamw"


ROWS: Final = (
    Row(16, "peft", "query and value", 8),
    Row(4, "peft", "query and value", 8),
    Row(4, "fleet", "query and value", 8),
    Row(4, "fleet", "query and value", 8, "sgd"),
    *(Row(4, "fleet", "all linear", rank) for rank in _ALL_RANKS),
    Row(4, "fleet", "all linear", _ALL_RANKS[-1], "sgd"),
)
"""LoRA on 16 bits, QLoRA by the same code and by ours, SGD, all layers, ranks: one thing changes from row to row."""


def check_table(job: TrainConfig) -> None:
    """Raises JobInvalid for a job that is no comparison of LoRA's."""
    if job.engine != "fleet":
        raise JobInvalid("engine", "the table compares with engine: fleet")
    if (job.loss.name, job.loss.kind) != ("sft", "nll"):
        raise JobInvalid("loss", "the table compares losses per token: loss: sft")


def job_of(job: TrainConfig, row: Row, steps: int, output: Path) -> TrainConfig:
    """The job with the row's adapter, for a few steps; of what it says of its adapter only the dropout is left."""
    own = job.training if job.training.optimizer == row.optimizer else OptimConfig(optimizer=row.optimizer)
    training = dataclasses.replace(
        few_steps(job, steps),
        optimizer=row.optimizer,
        betas=own.betas,
        momentum=own.momentum,
        hessian_update_period=None,
    )
    lora = LoraConfig(
        target_modules=_TARGETS[row.adapted], rank=row.rank, alpha=_ALPHA * row.rank, dropout=job.lora.dropout
    )
    return TrainConfig(
        model=job.model,
        output=output,
        data=job.data,
        lora=lora,
        training=training,
        checkpoint=CheckpointConfig(save_steps=0),  # no step waits for a disk, as none of PEFT's loop does
    )

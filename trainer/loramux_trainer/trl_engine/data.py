"""A job's data as trl's trainers have it after their own preparation: token ids, those that the server sees."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch.utils.data import Sampler

from loramux_trainer.base_reading import BaseReading, read_base
from loramux_trainer.batches import StepOrder
from loramux_trainer.data.dataset import DataReport, DataSet
from loramux_trainer.data.examples import IGNORE, Example, Unit
from loramux_trainer.data.prompts import EncodedPrompts, encode_prompts
from loramux_trainer.errors import DataInvalid, JobInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.preparation import read_job_data, source_of
from loramux_trainer.targets import modules_of


@dataclass(frozen=True, eq=False)
class TrlData:
    """Rows to train and to evaluate. `supervised`: tokens with a loss of each row, None where they are yet to be
    written; `order` says which rows make which step, None where trl decides.
    """

    reading: BaseReading
    train: list[dict[str, Any]]
    held: list[dict[str, Any]]
    report: DataReport
    digest: str
    longest: int  # positions that training sees
    supervised: list[int] | None = None
    order: FleetOrder | None = None


class FleetOrder(Sampler[int]):
    """Indices of rows, by epoch as a fleet of one has them, but for an incomplete batch, which comes last.

    `fixed`: every epoch as the first one.
    """

    def __init__(self, lengths: Sequence[int], job: TrainConfig, *, fixed: bool) -> None:
        training = job.training
        self._batch_size, self._fixed, self._epoch = training.batch_size, fixed, 0
        self._order = StepOrder(lengths, batch_size=training.batch_size, accumulation=1, seed=training.seed)
        self._count, self._accumulation = len(lengths), training.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        """The 0-based epoch that is gone through next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows(self._epoch))

    def rows(self, epoch: int) -> list[int]:
        """Those of an epoch, batch after batch."""
        per_epoch = self._order.steps_per_epoch
        first = 0 if self._fixed else epoch * per_epoch
        batches = [batch for step in range(first, first + per_epoch) for batch in self._order.micro_batches(step)]
        batches.sort(key=lambda batch: len(batch) < self._batch_size)
        return list(itertools.chain.from_iterable(batches))

    def rows_of(self, step: int) -> list[int]:
        """Those of 0-based optimizer `step`."""
        size = self._batch_size * self._accumulation
        epoch, index = divmod(step, -(-self._count // size))
        return self.rows(epoch)[index * size : (index + 1) * size]


def read_data(job: TrainConfig) -> TrlData:
    """All that can be refused without the base's weights. Raises JobInvalid, DataInvalid and SeveralInvalid."""
    if job.loss.name == "grpo":
        reading = read_base(job, source_of(job))
        modules_of(job, reading.outline)
        context = reading.outline.context_length
        prompts = encode_prompts(job.data, reading.encoder, context, job.loss.longest_completion)
        return _of_prompts(job, reading, prompts)
    prepared = read_job_data(job)
    data = prepared.data
    order = FleetOrder([unit.tokens for unit in data.train], job, fixed=job.loss.name == "kto")
    return TrlData(
        prepared.reading,
        [_row(unit, job) for unit in data.train],
        [_row(unit, job) for unit in data.eval],
        data.report,
        data.digest,
        _longest(data),
        [unit.supervised for unit in data.train],
        order,
    )


def _row(unit: Unit, job: TrainConfig) -> dict[str, Any]:
    if job.loss.name == "sft":
        (row,) = unit.rows
        # The first token is never predicted: trl counts it among those of the mean where it has a label.
        return {"input_ids": list(row.ids), "labels": [IGNORE, *row.labels[1:]]}
    if job.loss.name == "reward":
        return {"chosen_ids": list(unit.rows[0].ids), "rejected_ids": list(unit.rows[1].ids)}
    answers = [_parted(row) for row in unit.rows]
    prompt, answer = answers[0]
    if job.loss.name == "kto":
        return {"prompt_ids": prompt, "completion_ids": answer, "label": unit.label}
    if answers[1][0] != prompt:
        raise JobInvalid("engine", "trl takes answers to one prompt only, and two differ before it; use engine: fleet")
    return {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answers[1][1]}


def _parted(row: Example) -> tuple[list[int], list[int]]:
    """(ids without a loss, ids with one): trl knows a prompt and what follows it, nothing between."""
    begin = next(index for index, label in enumerate(row.labels) if label != IGNORE)
    if any(label == IGNORE for label in row.labels[begin:]):
        raise JobInvalid(
            "engine",
            "trl compares answers as a whole, and a part of one has no loss, by the chat template's marks or as it "
            "holds a turn of the user; use engine: fleet",
        )
    return list(row.ids[:begin]), list(row.ids[begin:])


def _longest(data: DataSet) -> int:
    return max(unit.longest for unit in (*data.train, *data.eval))


def _of_prompts(job: TrainConfig, reading: BaseReading, prompts: EncodedPrompts) -> TrlData:
    lengths = [len(ids) for ids in prompts.ids]
    columns = set(itertools.chain.from_iterable(prompts.records))
    for name in columns:
        if any(name not in record for record in prompts.records):
            raise DataInvalid(job.data.train, 0, f"{name} is in some records only; give it in all, or in none")
    report = DataReport(
        records=prompts.read,
        train=len(lengths),
        eval=0,
        duplicates=prompts.copies,
        leaked=0,
        too_long=prompts.too_long,
        endless=0,
        tokens=sum(lengths),
        masked=sum(lengths),
        longest=max(lengths),
        dropped=prompts.too_long,
        masked_share=1.0,
        median=median(lengths),
        units=len(lengths),
    )
    digest = hashlib.sha256(json.dumps([prompts.records, prompts.ids], default=str).encode()).hexdigest()
    longest = max(lengths) + job.loss.longest_completion
    return TrlData(reading, list(prompts.records), [], report, digest, longest)

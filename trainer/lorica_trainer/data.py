"""JSONL files into encoded training and evaluation sets, with a report of what was left out and why.

Knows no batch and no model: how a record becomes tokens is handed in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica_trainer.errors import DataInvalid
from lorica_trainer.examples import IGNORE, Example, ExampleEncoder
from lorica_trainer.job import DataJob
from lorica_trainer.records import RecordInvalid, read_records

Examples = tuple[Example, ...]


@dataclass(frozen=True)
class DataReport:
    """What became of the records. `masked` counts tokens that carry no loss (prompts).

    All but `records` count examples: a record is one, but for a conversation whose turns cannot share a sequence.
    """

    records: int  # of the training file
    train: int
    eval: int
    duplicates: int  # exact copies, dropped unless the job keeps them
    leaked: int  # eval records that are also in train, dropped from eval
    overlong: int  # longer than max_length: dropped or truncated as the job says
    endless: int  # truncated before the token that ends them, and trained so
    tokens: int  # of the training set
    masked: int
    longest: int


@dataclass(frozen=True)
class DataSet:
    """Encoded examples. `digest` identifies the training set in its order."""

    train: Examples
    eval: Examples
    report: DataReport
    digest: str


def load_data(job: DataJob, encoder: ExampleEncoder, *, seed: int) -> DataSet:
    """Read, encode, clean and split. Raises DataInvalid with file and line."""
    records, raw = _read(job.train, encoder)
    train = raw if job.keep_duplicates else tuple(dict.fromkeys(raw))
    duplicates = len(raw) - len(train)
    held: Examples = ()
    leaked = 0
    if job.eval is not None:
        read = tuple(dict.fromkeys(_read(job.eval, encoder)[1]))
        trained = set(train)
        held = tuple(example for example in read if example not in trained)
        leaked = len(read) - len(held)
        if not held:
            raise DataInvalid(job.eval, 0, "every evaluation record is also in the training file")
    elif job.eval_fraction:
        train, held = _split(train, job.eval_fraction, seed)
        if not train:
            raise DataInvalid(job.train, 0, "one distinct record cannot be split: leave out data.eval_fraction")
    fitted_train, cut_train = _fit(train, job)
    fitted_held, cut_held = _fit(held, job)
    if not fitted_train:
        reason = f"{cut_train} are longer than data.max_length = {job.max_length}"
        raise DataInvalid(job.train, 0, f"no record is left to train on: {reason}")
    if held and not fitted_held:
        reason = f"{cut_held} are longer than data.max_length = {job.max_length}"
        raise DataInvalid(job.eval or job.train, 0, f"no record is left to evaluate on: {reason}")
    endless = sum(encoder.end_ids.isdisjoint(_last_run(example)) for example in fitted_train)
    if endless == len(fitted_train):
        raise DataInvalid(
            job.train,
            0,
            f"every record is truncated before the token that ends it, so the adapter would never stop: raise "
            f"data.max_length over {job.max_length}, or drop them by data.overlong: drop",
        )
    report = DataReport(
        records=records,
        train=len(fitted_train),
        eval=len(fitted_held),
        duplicates=duplicates,
        leaked=leaked,
        overlong=cut_train + cut_held,
        endless=endless,
        tokens=sum(len(example.ids) for example in fitted_train),
        masked=sum(len(example.ids) - example.supervised for example in fitted_train),
        longest=max(len(example.ids) for example in fitted_train),
    )
    return DataSet(fitted_train, fitted_held, report, _digest(fitted_train))


def _read(path: Path, encoder: ExampleEncoder) -> tuple[int, Examples]:
    """(how many records, their examples)"""
    records, examples = 0, list[Example]()
    for line, record in read_records(path):
        try:
            examples += encoder.encode(record)
        except RecordInvalid as error:
            raise DataInvalid(path, line, str(error)) from error
        records += 1
    return records, tuple(examples)


def _split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split by distinct content, so that copies of one example never stand on both sides."""
    distinct = list(dict.fromkeys(examples))
    random.Random(f"split/{seed}").shuffle(distinct)
    held = set(distinct[: max(1, round(fraction * len(distinct)))])
    return tuple(e for e in examples if e not in held), tuple(e for e in distinct if e in held)


def _fit(examples: Examples, job: DataJob) -> tuple[Examples, int]:
    """(examples of at most max_length that still carry a loss, how many were longer)."""
    kept, overlong = [], 0
    for example in examples:
        if len(example.ids) > job.max_length:
            overlong += 1
            example = example.truncated(job.max_length)
            if job.overlong == "drop" or not example.supervised:
                continue
        kept.append(example)
    return tuple(kept), overlong


def _last_run(example: Example) -> tuple[int, ...]:
    """The last run of tokens with a loss, that of the last turn."""
    reached = itertools.dropwhile(lambda label: label == IGNORE, reversed(example.labels))
    return tuple(itertools.takewhile(lambda label: label != IGNORE, reached))


def _digest(examples: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.ids, example.labels]).encode())
    return total.hexdigest()

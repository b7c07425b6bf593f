"""JSONL files into encoded training and evaluation sets, with a report of what was left out and why.

Knows no batch and no model: how a record becomes tokens is handed in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from loramux_trainer.data_config import DataConfig
from loramux_trainer.errors import DataInvalid, JobInvalid, Problems
from loramux_trainer.examples import IGNORE, Example, ExampleEncoder
from loramux_trainer.records import RecordInvalid, read_records

Examples = tuple[Example, ...]
E = TypeVar("E", bound=Hashable)


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
    too_long: int  # longer than max_length: dropped or truncated as the job says
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


@dataclass(frozen=True)
class _Fitted:
    """What is left of a side's examples: those that fit, as they are trained, and how many were longer."""

    kept: Examples
    cut: int


@dataclass(frozen=True)
class Sides(Generic[E]):
    """Which examples train and which are held out. Equal ones are copies; E is an example or its sketch."""

    train: tuple[E, ...]
    held: tuple[E, ...]
    duplicates: int
    leaked: int


@dataclass(frozen=True)
class Left:
    """How many examples are left on each side, and were longer than max_length there."""

    train: int
    train_cut: int
    held: int
    held_cut: int
    endless: int  # of those left to train


def load_data(job: DataConfig, encoder: ExampleEncoder, *, seed: int) -> DataSet:
    """Read, encode, clean and split. Raises DataInvalid with file and line, and SeveralInvalid for several lines."""
    problems = Problems()
    records, raw = _read(job.train, encoder, problems)
    held_raw = None if job.eval is None else _read(job.eval, encoder, problems)[1]
    problems.raise_any()
    sides = part(raw, held_raw, job, seed)
    train, held = _fit(sides.train, job), _fit(sides.held, job)
    endless = sum(is_endless(example, encoder) for example in train.kept)
    refuse_empty(
        job,
        Left(train=len(train.kept), train_cut=train.cut, held=len(held.kept), held_cut=held.cut, endless=endless),
    )
    report = DataReport(
        records=records,
        train=len(train.kept),
        eval=len(held.kept),
        duplicates=sides.duplicates,
        leaked=sides.leaked,
        too_long=train.cut + held.cut,
        endless=endless,
        tokens=sum(len(example.ids) for example in train.kept),
        masked=sum(len(example.ids) - example.supervised for example in train.kept),
        longest=max(len(example.ids) for example in train.kept),
    )
    return DataSet(train.kept, held.kept, report, _digest(train.kept))


def encode_records(path: Path, encoder: ExampleEncoder, problems: Problems) -> Iterator[Examples]:
    """The examples of each record that is in order; the others go to `problems` with their lines."""
    try:
        for line, record in read_records(path, problems):
            try:
                examples = encoder.encode(record)
            except RecordInvalid as error:
                problems.add(DataInvalid(path, line, str(error)))
                continue
            yield examples
    except DataInvalid as error:  # of the whole file
        problems.add(error)


def part(raw: tuple[E, ...], held_raw: tuple[E, ...] | None, job: DataConfig, seed: int) -> Sides[E]:
    """Which examples train and which are held out, copies left out. Raises DataInvalid where nothing is on a side."""
    train = raw if job.keep_duplicates else tuple(dict.fromkeys(raw))
    duplicates = len(raw) - len(train)
    held: tuple[E, ...] = ()
    leaked = 0
    if held_raw is not None:
        read = tuple(dict.fromkeys(held_raw))
        trained = set(train)
        held = tuple(example for example in read if example not in trained)
        leaked = len(read) - len(held)
        if not held:
            raise DataInvalid(job.eval or "", 0, "every evaluation record is also in the training file")
    elif job.eval_fraction:
        train, held = _split(train, job.eval_fraction, seed)
        if not train:
            raise DataInvalid(job.train, 0, "one distinct record cannot be split: leave out data.eval_fraction")
    return Sides(train, held, duplicates, leaked)


def refuse_empty(job: DataConfig, left: Left) -> None:
    """Raises DataInvalid when nothing is left to train or to evaluate on, or no end is left to learn."""
    if not left.train:
        reason = f"{left.train_cut} are longer than data.max_length = {job.max_length}"
        raise DataInvalid(job.train, 0, f"no record is left to train on: {reason}")
    if left.held_cut and not left.held:
        reason = f"{left.held_cut} are longer than data.max_length = {job.max_length}"
        raise DataInvalid(job.eval or job.train, 0, f"no record is left to evaluate on: {reason}")
    if left.endless == left.train:
        raise DataInvalid(
            job.train,
            0,
            f"every record is truncated before the token that ends it, so the adapter would never stop: raise "
            f"data.max_length over {job.max_length}, or drop them by data.truncation: drop",
        )


def check_context(longest: int, context: int) -> None:
    """Raises JobInvalid where an example of `longest` tokens is too long for the base."""
    if longest > context:
        raise JobInvalid("data.max_length", f"an example has {longest} tokens, the base's context is {context}")


def fit(example: Example, job: DataConfig) -> tuple[Example | None, bool]:
    """(the example with at most max_length tokens, None where it is left out; whether it was longer)."""
    if len(example.ids) <= job.max_length:
        return example, False
    example = example.truncated(job.max_length)
    return (None if job.truncation == "drop" or not example.supervised else example), True


def is_endless(example: Example, encoder: ExampleEncoder) -> bool:
    """Whether it does not teach the adapter to stop."""
    return encoder.end_ids.isdisjoint(_last_run(example))


def _read(path: Path, encoder: ExampleEncoder, problems: Problems) -> tuple[int, Examples]:
    """(how many records, their examples)"""
    records, examples = 0, list[Example]()
    for encoded in encode_records(path, encoder, problems):
        examples += encoded
        records += 1
    return records, tuple(examples)


def _split(examples: tuple[E, ...], fraction: float, seed: int) -> tuple[tuple[E, ...], tuple[E, ...]]:
    """Split by distinct content, so that copies of one example never stand on both sides."""
    distinct = list(dict.fromkeys(examples))
    random.Random(f"split/{seed}").shuffle(distinct)
    held = set(distinct[: max(1, round(fraction * len(distinct)))])
    return tuple(e for e in examples if e not in held), tuple(e for e in distinct if e in held)


def _fit(examples: Examples, job: DataConfig) -> _Fitted:
    fitted = [fit(example, job) for example in examples]
    return _Fitted(
        tuple(example for example, _ in fitted if example is not None), sum(was_longer for _, was_longer in fitted)
    )


def _last_run(example: Example) -> tuple[int, ...]:
    """The last run of tokens with a loss, that of the last turn."""
    reached = itertools.dropwhile(lambda label: label == IGNORE, reversed(example.labels))
    return tuple(itertools.takewhile(lambda label: label != IGNORE, reached))


def _digest(examples: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.ids, example.labels]).encode())
    return total.hexdigest()

"""Data files into encoded training and evaluation sets, with a report of what was left out and why.

Knows no batch and no model: how a record becomes tokens is handed in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from loramux_trainer.data.examples import ExampleEncoder, Unit
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.data.records import read_records
from loramux_trainer.data.units import check_options, encode_units, fit, is_endless, packed
from loramux_trainer.errors import DataInvalid, JobInvalid, Problems
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import SFT, LossConfig

Units = tuple[Unit, ...]
E = TypeVar("E", bound=Hashable)
Records = Sequence[Sequence[E]]
"""The examples of each record."""


@dataclass(frozen=True)
class DataReport:
    """What became of the records. `masked` counts tokens that carry no loss (prompts).

    Counts are of examples: a record is one, a pair too, but for a conversation whose turns cannot share a sequence.
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
    dropped: int = 0  # of those that are too long
    truncated: int = 0
    masked_share: float = 0.0  # of the tokens
    median: float = 0.0  # tokens of a row; a pair has two
    units: int = 0  # what a batch is made of: packs where the job packs, else examples
    desirable: int = 0  # of the training examples, by KTO's label
    undesirable: int = 0

    def describe(self) -> str:
        """One line for the person who started the run; what there is none of is left out."""
        shown = (
            (self.desirable, "desirable"),
            (self.undesirable, "undesirable"),
            (self.units if self.units != self.train else 0, "packs"),
            (self.duplicates, "duplicates"),
            (self.leaked, "leaked"),
            (self.dropped, "too long"),
            (self.truncated, "truncated"),
        )
        counts = "".join(f"; {count:,} {what}" for count, what in shown if count)
        return (
            f"{self.train:,} examples to train, {self.eval:,} to evaluate; {self.tokens:,} tokens, "
            f"{self.masked_share:.0%} without loss, longest {self.longest:,}{counts}"
        )


@dataclass(frozen=True)
class DataSet:
    """Encoded units. The digests identify the training set in its order, and the evaluation set."""

    train: Units
    eval: Units
    report: DataReport
    digest: str
    eval_digest: str = ""


@dataclass(frozen=True)
class _Fitted:
    """What is left of a side's examples: those that fit, as they are trained, and how many were longer."""

    kept: Units
    cut: int


@dataclass(frozen=True)
class Sides(Generic[E]):
    """Which examples train and which are held out. Equal ones are copies; E is a unit or its sketch."""

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


def load_data(job: DataConfig, encoder: ExampleEncoder, *, seed: int, loss: LossConfig = SFT) -> DataSet:
    """Read, encode, clean, split and pack. Raises DataInvalid with file and line, SeveralInvalid for several lines, and
    JobInvalid for an option that would not take effect.
    """
    check_options(job, loss, encoder)
    problems = Problems()
    raw = tuple(encode_records(job.train, job, encoder, loss, problems))
    held_raw = None if job.eval is None else tuple(encode_records(job.eval, job, encoder, loss, problems))
    problems.raise_any()
    sides = part(raw, held_raw, job, seed)
    train, held = _fit(sides.train, job), _fit(sides.held, job)
    endless = sum(is_endless(unit, encoder) for unit in train.kept)
    left = Left(train=len(train.kept), train_cut=train.cut, held=len(held.kept), held_cut=held.cut, endless=endless)
    refuse_empty(job, left)
    packs = packed(train.kept, job)
    kept = [_Counted(tuple(len(row.ids) for row in unit.rows), unit.supervised, unit.label) for unit in train.kept]
    report = make_report(len(raw), sides, left, kept, units=len(packs))
    return DataSet(packs, held.kept, report, _digest(packs), _digest(held.kept))


class Counts(Protocol):
    """What the report needs of an example that is trained."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each row."""
        ...

    @property
    def supervised(self) -> int:
        """Tokens with a loss, of all rows."""
        ...

    @property
    def label(self) -> bool | None:
        """KTO's."""
        ...


@dataclass(frozen=True)
class _Counted:
    rows: tuple[int, ...]
    supervised: int
    label: bool | None


def make_report(records: int, sides: Sides[E], left: Left, kept: Sequence[Counts], *, units: int) -> DataReport:
    """`kept`: what is left to train; `units`: what of it a batch is made of."""
    lengths = [length for each in kept for length in each.rows]
    masked = sum(lengths) - sum(each.supervised for each in kept)
    dropped = len(sides.train) - left.train + len(sides.held) - left.held
    too_long = left.train_cut + left.held_cut
    return DataReport(
        records=records,
        train=left.train,
        eval=left.held,
        duplicates=sides.duplicates,
        leaked=sides.leaked,
        too_long=too_long,
        endless=left.endless,
        tokens=sum(lengths),
        masked=masked,
        longest=max(lengths),
        dropped=dropped,
        truncated=too_long - dropped,
        masked_share=round(masked / sum(lengths), 4),
        median=statistics.median(lengths),
        units=units,
        desirable=sum(each.label is True for each in kept),
        undesirable=sum(each.label is False for each in kept),
    )


def encode_records(
    path: Path, job: DataConfig, encoder: ExampleEncoder, loss: LossConfig, problems: Problems
) -> Iterator[Units]:
    """The units of each record that is in order; the others go to `problems` with their lines."""
    try:
        for line, record in read_records(path, problems, job, loss):
            try:
                units = encode_units(record, encoder, job, loss)
            except RecordInvalid as error:
                problems.add(DataInvalid(path, line, str(error)))
                continue
            yield units
    except DataInvalid as error:  # of the whole file
        problems.add(error)


_ALL_LEAKED = "every evaluation record is also in the training file: give others, or data.eval_fraction in its place"


def part(records: Records[E], held_records: Records[E] | None, job: DataConfig, seed: int) -> Sides[E]:
    """Which examples train and which are held out, copies left out. Raises DataInvalid where nothing is on a side."""
    raw = tuple(itertools.chain.from_iterable(records))
    held_raw = None if held_records is None else tuple(itertools.chain.from_iterable(held_records))
    train = raw if job.keep_duplicates else tuple(dict.fromkeys(raw))
    duplicates = len(raw) - len(train)
    held: tuple[E, ...] = ()
    leaked = 0
    if held_raw is not None:
        read = tuple(dict.fromkeys(held_raw))
        trained = set(train)
        held = tuple(unit for unit in read if unit not in trained)
        leaked = len(read) - len(held)
        if not held:
            raise DataInvalid(job.eval or "", 0, _ALL_LEAKED)
    elif job.eval_fraction:
        train, held = _split(train, records, job.eval_fraction, seed)
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
    if left.endless == left.train and not left.train_cut:
        raise DataInvalid(
            job.train,
            0,
            "no record ends with a token at which the base stops, so the adapter would never stop: append it to "
            "input_ids, with its label",
        )
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


def _split(
    units: tuple[E, ...], records: Records[E], fraction: float, seed: int
) -> tuple[tuple[E, ...], tuple[E, ...]]:
    """Split by distinct content: neither copies of one example nor the examples of one record (turns of a conversation,
    both answers of a pair) stand on both sides.
    """
    groups = _groups(records)
    random.Random(f"split/{seed}").shuffle(groups)
    held = {unit for group in groups[: max(1, round(fraction * len(groups)))] for unit in group}
    distinct = itertools.chain.from_iterable(groups)
    return tuple(e for e in units if e not in held), tuple(e for e in distinct if e in held)


def _groups(records: Records[E]) -> list[list[E]]:
    """Distinct examples in order; those of one record together, and of all records that share one."""
    found: dict[E, list[E]] = {}  # example -> the group it is in
    for units in records:
        own: list[E] = []
        for unit in units:
            known = found.get(unit)
            if known is own:
                continue
            moved = [unit] if known is None else known
            if not own:
                own = moved
            else:
                own.extend(moved)
            found.update(dict.fromkeys(moved, own))
    return list({id(group): group for group in found.values()}.values())


def _fit(units: Units, job: DataConfig) -> _Fitted:
    fitted = [fit(unit, job) for unit in units]
    return _Fitted(tuple(unit for unit, _ in fitted if unit is not None), sum(was_longer for _, was_longer in fitted))


def _digest(units: Sequence[Unit]) -> str:
    """Of single rows without a label it is what it was before there were units: checkpoints go on."""
    total = hashlib.sha256()
    for unit in units:
        if len(unit.rows) > 1 or unit.label is not None:
            total.update(json.dumps([len(unit.rows), unit.label]).encode())
        for row in unit.rows:
            total.update(json.dumps([row.ids, row.labels]).encode())
    return total.hexdigest()

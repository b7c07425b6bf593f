"""What load_data would refuse, found without keeping the tokens: of each example a digest and how it fits.

Judges by the very functions of the run, so that a file that passes here passes there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loramux_trainer.data.dataset import DataReport, Left, encode_records, make_report, part, refuse_empty
from loramux_trainer.data.examples import ExampleEncoder, Unit
from loramux_trainer.data.units import check_options, fit, is_endless, pack
from loramux_trainer.errors import Problems
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import SFT, LossConfig


@dataclass(frozen=True, slots=True)
class _Sketch:
    """Stands for a unit: equal for equal ones."""

    digest: bytes
    rows: tuple[int, ...]  # tokens of each row of what is trained, none where it is left out
    supervised: int
    label: bool | None
    was_longer: bool
    endless: bool

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return sum(self.rows)


@dataclass(frozen=True)
class DataLengths:
    """Tokens of each unit that a run would train or evaluate on, and of the longest row of all."""

    train: tuple[int, ...]
    held: tuple[int, ...]
    longest: int
    report: DataReport


def check_data(job: DataConfig, encoder: ExampleEncoder, *, seed: int, loss: LossConfig = SFT) -> DataLengths:
    """Raises what load_data raises."""
    check_options(job, loss, encoder)
    problems = Problems()
    raw = tuple(_sketches(job.train, job, encoder, loss, problems))
    held_raw = None if job.eval is None else tuple(_sketches(job.eval, job, encoder, loss, problems))
    problems.raise_any()
    sides = part(raw, held_raw, job, seed)
    train = [sketch for sketch in sides.train if sketch.rows]
    held = [sketch for sketch in sides.held if sketch.rows]
    left = Left(
        train=len(train),
        train_cut=sum(sketch.was_longer for sketch in sides.train),
        held=len(held),
        held_cut=sum(sketch.was_longer for sketch in sides.held),
        endless=sum(sketch.endless for sketch in train),
    )
    refuse_empty(job, left)
    lengths = [sketch.tokens for sketch in train]
    if job.packing:
        lengths = [sum(lengths[index] for index in group) for group in pack(lengths, job.max_length)]
    report = make_report(len(raw), sides, left, train, units=len(lengths))
    longest = max(max(sketch.rows) for sketch in (*train, *held))
    return DataLengths(tuple(lengths), tuple(sketch.tokens for sketch in held), longest, report)


def _sketches(
    path: Path, job: DataConfig, encoder: ExampleEncoder, loss: LossConfig, problems: Problems
) -> Iterator[tuple[_Sketch, ...]]:
    """Those of each record."""
    for units in encode_records(path, job, encoder, loss, problems):
        yield tuple(_sketch(unit, job, encoder) for unit in units)


def _sketch(unit: Unit, job: DataConfig, encoder: ExampleEncoder) -> _Sketch:
    fitted, was_longer = fit(unit, job)
    return _Sketch(
        digest=_digest(unit),
        rows=() if fitted is None else tuple(len(row.ids) for row in fitted.rows),
        supervised=0 if fitted is None else fitted.supervised,
        label=unit.label,
        was_longer=was_longer,
        endless=fitted is not None and is_endless(fitted, encoder),
    )


def _digest(unit: Unit) -> bytes:
    total = hashlib.sha256(repr(unit.label).encode())
    for row in unit.rows:
        total.update(array("q", (len(row.ids), *row.ids, *row.labels)).tobytes())
    return total.digest()[:16]

"""What load_data would refuse, found without keeping the tokens: of each example a digest and how it fits.

Judges by the very functions of the run, so that a file that passes here passes there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loramux_trainer.data import Left, encode_records, fit, is_endless, part, refuse_empty
from loramux_trainer.data_config import DataConfig
from loramux_trainer.errors import Problems
from loramux_trainer.examples import Example, ExampleEncoder


@dataclass(frozen=True, slots=True)
class _Sketch:
    """Stands for an example: equal for equal ones."""

    digest: bytes
    length: int  # of what is trained, 0 where it is left out
    was_longer: bool
    endless: bool


@dataclass(frozen=True)
class DataLengths:
    """Tokens of each example that a run would train or evaluate on."""

    train: tuple[int, ...]
    held: tuple[int, ...]


def check_data(job: DataConfig, encoder: ExampleEncoder, *, seed: int) -> DataLengths:
    """Raises what load_data raises."""
    problems = Problems()
    raw = tuple(_sketches(job.train, job, encoder, problems))
    held_raw = None if job.eval is None else tuple(_sketches(job.eval, job, encoder, problems))
    problems.raise_any()
    sides = part(raw, held_raw, job, seed)
    train = [sketch for sketch in sides.train if sketch.length]
    held = [sketch for sketch in sides.held if sketch.length]
    refuse_empty(
        job,
        Left(
            train=len(train),
            train_cut=sum(sketch.was_longer for sketch in sides.train),
            held=len(held),
            held_cut=sum(sketch.was_longer for sketch in sides.held),
            endless=sum(sketch.endless for sketch in train),
        ),
    )
    return DataLengths(tuple(sketch.length for sketch in train), tuple(sketch.length for sketch in held))


def _sketches(path: Path, job: DataConfig, encoder: ExampleEncoder, problems: Problems) -> Iterator[_Sketch]:
    for examples in encode_records(path, encoder, problems):
        for example in examples:
            fitted, was_longer = fit(example, job)
            yield _Sketch(
                digest=_digest(example),
                length=0 if fitted is None else len(fitted.ids),
                was_longer=was_longer,
                endless=fitted is not None and is_endless(fitted, encoder),
            )


def _digest(example: Example) -> bytes:
    return hashlib.sha256(array("q", (*example.ids, *example.labels)).tobytes()).digest()[:16]

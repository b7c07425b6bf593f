"""JSONL files into encoded training and evaluation sets, with a report of what was left out and why.

Knows no batch and no model: a tokenizer and the ids that end a turn are handed in.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica_trainer.errors import DataInvalid
from lorica_trainer.examples import ChatTokenizer, Example, ExampleInvalid, encode_record
from lorica_trainer.job import DataJob

Examples = tuple[Example, ...]


@dataclass(frozen=True)
class DataReport:
    """What became of the records. `masked` counts tokens that carry no loss (prompts)."""

    records: int
    train: int
    eval: int
    duplicates: int  # exact copies, dropped unless the job keeps them
    leaked: int  # eval records that are also in train, dropped from eval
    overlong: int  # longer than max_length: dropped or truncated as the job says
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


def load_data(job: DataJob, tokenizer: ChatTokenizer, end_ids: frozenset[int], *, seed: int) -> DataSet:
    """Read, encode, clean and split. Raises DataInvalid with file and line."""
    raw = _read(job.train, tokenizer, end_ids)
    train = raw if job.keep_duplicates else tuple(dict.fromkeys(raw))
    duplicates = len(raw) - len(train)
    held: Examples = ()
    leaked = 0
    if job.eval is not None:
        read = tuple(dict.fromkeys(_read(job.eval, tokenizer, end_ids)))
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
    report = DataReport(
        records=len(raw),
        train=len(fitted_train),
        eval=len(fitted_held),
        duplicates=duplicates,
        leaked=leaked,
        overlong=cut_train + cut_held,
        tokens=sum(len(example.ids) for example in fitted_train),
        masked=sum(len(example.ids) - example.supervised for example in fitted_train),
        longest=max(len(example.ids) for example in fitted_train),
    )
    return DataSet(fitted_train, fitted_held, report, _digest(fitted_train))


def _read(path: Path, tokenizer: ChatTokenizer, end_ids: frozenset[int]) -> Examples:
    examples = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    examples.append(encode_record(json.loads(line), tokenizer, end_ids))
                except json.JSONDecodeError as error:
                    raise DataInvalid(path, number, f"not JSON: {error.msg} at column {error.colno}") from error
                except ExampleInvalid as error:
                    raise DataInvalid(path, number, str(error)) from error
                except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python reads
                    raise DataInvalid(path, number, f"not JSON that can be read: {error}") from error
    except OSError as error:
        raise DataInvalid(path, 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataInvalid(path, 0, f"not UTF-8 at byte {error.start}") from error
    if not examples:
        raise DataInvalid(path, 0, "holds no record")
    return tuple(examples)


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


def _digest(examples: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.ids, example.labels]).encode())
    return total.hexdigest()

"""Data files into records to evaluate: the trainer's own readers, and for metric loss the tokens it would train on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.evaluation.values import EvalRecord, LabeledTokens
from loramux_trainer.data.files import read_values
from loramux_trainer.data.loss_records import explain_unread, reads
from loramux_trainer.data.record_types import Completion, Conversation, Record, RecordInvalid
from loramux_trainer.data.records import parse_record
from loramux_trainer.errors import DataInvalid
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import SFT

if TYPE_CHECKING:
    from loramux_trainer.data.examples import ExampleEncoder

_REGEX = "regex"


def read_eval_records(
    path: Path, *, base: str | None = None, limit: int | None = None, data: DataConfig | None = None
) -> tuple[EvalRecord, ...]:
    """The first `limit` records of a file of any form that the trainer reads, and a pattern by key `regex`.

    With `base` (a hub id, a directory, or the embedded base) they have their tokens, for metric loss. With `data`, the
    section of a job, they are read as that job reads them: its columns and its masks, no key `regex`, and with a base
    without those that it leaves out for their length. Raises TrainerError: DataInvalid with file and line, and
    ModelInvalid.
    """
    encoder = None if base is None else _encoder(base, path)
    records = []
    for number, value in itertools.islice(read_values(path), limit):
        try:
            record = _read(value, f"{path}:{number}", encoder, data)
        except RecordInvalid as error:
            raise DataInvalid(path, number, str(error)) from error
        if data is None or encoder is None or record.sequences:
            records.append(record)
    return tuple(records)


def _read(value: Any, where: str, encoder: ExampleEncoder | None, data: DataConfig | None) -> EvalRecord:
    pattern = None
    if data is None and isinstance(value, Mapping) and value.get(_REGEX) is not None:
        pattern = value[_REGEX]
        if not isinstance(pattern, str):
            raise RecordInvalid(f"{_REGEX} must be a string, not {pattern!r}")
        value = {key: content for key, content in value.items() if key != _REGEX}
    record = parse_record(value, data)
    if not reads(SFT, record):
        raise RecordInvalid(explain_unread(SFT, record).replace("loss sft", "an evaluation"))
    prompt, reference = _question(record)
    tools = record.tools if isinstance(record, Conversation) else None
    return EvalRecord(where, prompt, reference, tools, pattern, tuple(_labeled(record, encoder, data)))


def _question(record: Record) -> tuple[str | tuple[Mapping[str, Any], ...] | None, str | None]:
    """(what is asked, the reference): of a conversation its last trained turn, after the reference's earlier ones."""
    if isinstance(record, Completion):
        return record.prompt, record.completion
    if isinstance(record, Conversation):
        last = record.trained[-1]
        return record.messages[:last], record.messages[last].get("content")
    return None, None


def _labeled(record: Record, encoder: ExampleEncoder | None, data: DataConfig | None) -> Iterator[LabeledTokens]:
    if encoder is None:
        return
    from loramux_trainer.data.examples import IGNORE
    from loramux_trainer.data.units import encode_units, fit

    plain = DataConfig(Path())
    for unit in encode_units(record, encoder, data or plain, SFT):
        fitted = unit if data is None else fit(unit, data)[0]
        for row in () if fitted is None else fitted.rows:
            labels = enumerate(row.labels)
            yield LabeledTokens(row.ids, tuple(at for at, label in labels if at and label != IGNORE))


def _encoder(base: str, path: Path) -> ExampleEncoder:
    from loramux_trainer.base_reading import read_base
    from loramux_trainer.job import TrainConfig
    from loramux_trainer.preparation import source_of

    job = TrainConfig(model=base, output=path.parent, data=DataConfig(train=path), name="eval")
    return read_base(job, source_of(job)).encoder

"""Records into units, as the job's loss and masks want them; units that are too long, and packs of several.

Knows no file and no model.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace

from loramux_trainer.data.examples import IGNORE, Example, ExampleEncoder, Unit
from loramux_trainer.data.record_types import (
    Answer,
    Completion,
    Conversation,
    Judged,
    Pair,
    Record,
    RecordInvalid,
    Tokens,
)
from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.data_config import DataConfig
from loramux_trainer.schema.loss_config import LossConfig


def check_options(data: DataConfig, loss: LossConfig, encoder: ExampleEncoder) -> None:
    """Raises JobInvalid where an option of the data would not take effect with this loss and base."""
    if loss.name != "sft":
        asked = {
            "packing": data.packing,
            "completion_only_loss": data.completion_only_loss is not None,
            "assistant_only_loss": data.assistant_only_loss is not None,
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            raise JobInvalid(
                f"data.{option}",
                f"is not read by loss {loss.name}, which compares whole answers",
                remedy="leave it out",
            )
    if data.assistant_only_loss and not encoder.marks_generation:
        raise JobInvalid(
            "data.assistant_only_loss",
            "the base's chat template has no {% generation %} block to mark what is learned",
            remedy="leave it out: the turns of the assistant are then found without marks",
        )


def encode_units(record: Record, encoder: ExampleEncoder, data: DataConfig, loss: LossConfig) -> tuple[Unit, ...]:
    """The record's units: one, or several for a conversation that needs several sequences, and for a pair that KTO
    takes as two answers. Raises RecordInvalid.
    """
    if isinstance(record, Pair):
        pair = tuple(
            _whole(side, record_, encoder)
            for side, record_ in (("chosen", record.chosen), ("rejected", record.rejected))
        )
        if pair[0] == pair[1]:
            raise RecordInvalid("chosen and rejected are the same tokens: there is nothing to prefer")
        if loss.name == "kto":
            return Unit(pair[:1], True), Unit(pair[1:], False)
        return (Unit(pair),)
    if isinstance(record, Judged):
        return (Unit((_whole("", record.answer, encoder),), record.label),)
    return tuple(Unit((_masked(example, record, data),)) for example in encoder.encode(record))


def fit(unit: Unit, data: DataConfig) -> tuple[Unit | None, bool]:
    """(the unit with at most max_length tokens a row, None where it is left out; whether a row was longer)."""
    if unit.longest <= data.max_length:
        return unit, False
    if data.truncation == "drop":
        return None, True
    rows = tuple(row.truncated(data.max_length) for row in unit.rows)
    useless = any(not row.supervised for row in rows) or (len(rows) == 2 and rows[0] == rows[1])
    return (None if useless else replace(unit, rows=rows)), True


def is_endless(unit: Unit, encoder: ExampleEncoder) -> bool:
    """Whether a row of it does not teach the adapter to stop."""
    return any(encoder.end_ids.isdisjoint(_last_run(row)) for row in unit.rows)


def pack(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the units of each pack: longest first, each into the fullest pack that has room (best fit).

    Packs come in the order of their first units.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, which pack), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect.bisect_left(room, (lengths[index], -1))
        if at == len(room):
            packs.append([index])
            left, which = capacity - lengths[index], len(packs) - 1
        else:
            left, which = room.pop(at)
            packs[which].append(index)
            left -= lengths[index]
        bisect.insort(room, (left, which))
    return tuple(sorted(tuple(sorted(members)) for members in packs))


def packed(units: Sequence[Unit], data: DataConfig) -> tuple[Unit, ...]:
    """The units as the job packs them."""
    if not data.packing:
        return tuple(units)
    groups = pack([unit.tokens for unit in units], data.max_length)
    return tuple(Unit(tuple(row for index in group for row in units[index].rows)) for group in groups)


def _whole(side: str, answer: Answer, encoder: ExampleEncoder) -> Example:
    """The one example of an answer that a loss compares as a whole."""
    where = f"{side}: " if side else ""
    try:
        examples = encoder.encode(answer)
    except RecordInvalid as error:
        raise RecordInvalid(f"{where}{error}") from error
    if len(examples) > 1:
        raise RecordInvalid(
            f"{where}the chat template renders earlier turns in another way once later ones follow, so that the answer "
            "is no one sequence: leave all but its last turn in the prompt"
        )
    return examples[0]


def _masked(example: Example, record: Answer | Tokens, data: DataConfig) -> Example:
    """With the loss where the job wants it."""
    if isinstance(record, Completion):
        if data.assistant_only_loss is not None:
            raise RecordInvalid("data.assistant_only_loss is for messages, and this record has none")
        return Example(example.ids, example.ids) if data.completion_only_loss is False else example
    for option in ("completion_only_loss", "assistant_only_loss"):
        wanted_of = "token ids have their labels" if isinstance(record, Tokens) else "messages have assistant_only_loss"
        if getattr(data, option) is not None and (isinstance(record, Tokens) or option == "completion_only_loss"):
            raise RecordInvalid(f"data.{option} is not for this record: {wanted_of}")
    if isinstance(record, Conversation) and data.assistant_only_loss is False:
        spoken = tuple(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        if spoken != record.trained:
            raise RecordInvalid(
                "a turn has weight 0 or is of a prompt, but data.assistant_only_loss: false learns all of it"
            )
        return Example(example.ids, example.ids)
    return example


def _last_run(example: Example) -> tuple[int, ...]:
    """The last run of tokens with a loss, that of the last turn."""
    reached = itertools.dropwhile(lambda label: label == IGNORE, reversed(example.labels))
    return tuple(itertools.takewhile(lambda label: label != IGNORE, reached))

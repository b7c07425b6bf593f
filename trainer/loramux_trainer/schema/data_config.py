"""The `data` section of a job: where the records are, how they are read, and what of them is trained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from loramux_adapters.validation import FilePath, Number, Section, Text, Whole, YesNo

RECORD_KEYS: Final = (
    *("prompt", "completion", "messages", "tools", "text", "chosen", "rejected", "label"),
    *("conversations", "system", "instruction", "input", "output"),
    *("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks"),
)
"""What a record's keys can be called."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the records are and how they become tokens.

    `columns`: our key -> what the file calls it. `ignore_columns`: keys of the file that are not to be read.
    `completion_only_loss` and `assistant_only_loss` are trl's: None is the loss on answers only, found without marks.
    """

    train: FilePath
    eval: FilePath | None = None
    eval_fraction: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    max_length: Annotated[Whole, Field(ge=2)] = 1024  # tokens per example
    truncation: Literal["drop", "truncate"] = "drop"
    keep_duplicates: YesNo = False
    packing: YesNo = False  # several examples under max_length make one unit
    completion_only_loss: YesNo | None = None  # false: the prompt is learned too
    assistant_only_loss: YesNo | None = None  # true: the template's marks decide; false: all of a conversation
    instruction_format: Literal["chat", "alpaca"] = "chat"  # how instruction, input and output become text
    columns: Mapping[Text, Text] = field(default_factory=dict, hash=False)
    ignore_columns: tuple[Text, ...] = ()

    @field_validator("eval_fraction")
    @classmethod
    def _is_from_one_place(cls, fraction: float, others: ValidationInfo) -> float:
        if fraction and others.data.get("eval") is not None:
            raise ValueError("give either an eval file or an eval fraction, not both")
        return fraction

    @field_validator("columns")
    @classmethod
    def _names_each_once(cls, columns: Mapping[str, str]) -> Mapping[str, str]:
        for name in columns:
            if name not in RECORD_KEYS:
                close = difflib.get_close_matches(name, RECORD_KEYS, n=1) or [", ".join(RECORD_KEYS)]
                raise ValueError(f"{name} is not a key of a record; did you mean {close[0]}?")
        if len(set(columns.values())) != len(columns):
            raise ValueError("gives one column of the file two names")
        return columns

    @field_validator("ignore_columns")
    @classmethod
    def _ignores_what_is_not_read(cls, ignored: tuple[str, ...], others: ValidationInfo) -> tuple[str, ...]:
        for name in ignored:
            if name in others.data.get("columns", {}).values():
                raise ValueError(f"{name} is also in data.columns: it is either read or ignored")
        return ignored

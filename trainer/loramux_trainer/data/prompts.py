"""Prompts whose answers are sampled while training; the columns beside them go to what scores the answers.

Knows no model and no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_trainer.data.examples import ExampleEncoder
from loramux_trainer.data.files import read_values
from loramux_trainer.data.record_messages import check_message, refuse_half_characters
from loramux_trainer.data.record_types import RecordInvalid
from loramux_trainer.data.records import renamed
from loramux_trainer.errors import DataInvalid, JobInvalid, Problems
from loramux_trainer.schema.data_config import DataConfig

_TAKEN: Final = frozenset(
    {"completion", "completions", "prompts", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric",
     "environment", "environments", "image", "images", "tools"}
)  # fmt: skip
"""What trl calls its own arguments of a reward function, and columns that change what it does."""


def read_prompts(path: Path, problems: Problems, data: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of each record that is in order: `prompt`, a text or messages, and the columns beside it.

    The others go to `problems`; raises DataInvalid of the whole file.
    """
    for number, value in read_values(path, problems):
        try:
            record = dict(renamed(value, data)) if isinstance(value, Mapping) else {}
            _check(record)
        except RecordInvalid as error:
            problems.add(DataInvalid(path, number, str(error)))
            continue
        yield number, record


@dataclass(frozen=True)
class EncodedPrompts:
    """Records of prompts that fit, with the tokens that the server has of each."""

    records: tuple[dict[str, Any], ...]
    ids: tuple[tuple[int, ...], ...]
    read: int
    copies: int
    too_long: int


def encode_prompts(job: DataConfig, encoder: ExampleEncoder, context: int, answer: int) -> EncodedPrompts:
    """All that are not longer than max_length, copies left out unless the job keeps them.

    `context` is the base's, `answer` the most tokens that follow. Raises DataInvalid, JobInvalid and SeveralInvalid.
    """
    problems = Problems()
    kept: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
    read = too_long = 0
    for line, record in read_prompts(job.train, problems, job):
        read += 1
        try:
            ids = tuple(encoder.encode_prompt(record["prompt"]))
        except RecordInvalid as error:
            problems.add(DataInvalid(job.train, line, str(error)))
            continue
        too_long += len(ids) > job.max_length
        if len(ids) <= job.max_length:
            key = json.dumps(record, sort_keys=True, default=str)
            kept[f"{key}{read if job.keep_duplicates else ''}"] = record, ids
    problems.raise_any()
    if not kept:
        reason = f"all prompts are longer than data.max_length = {job.max_length}"
        raise DataInvalid(job.train, 0, f"no record is left to train on: {reason}")
    longest = max(len(ids) for _, ids in kept.values())
    if longest + answer > context:
        raise JobInvalid(
            "loss.max_completion_length",
            f"a prompt of {longest} tokens and an answer of {answer} are more than the base's context, {context}",
        )
    records, encoded = zip(*kept.values(), strict=True)
    return EncodedPrompts(records, encoded, read, read - too_long - len(kept), too_long)


def _check(record: Mapping[str, Any]) -> None:
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt:
        for index, message in enumerate(prompt):
            check_message(f"prompt[{index}]", message)
        if prompt[-1]["role"] == "assistant":
            raise RecordInvalid("prompt ends with the assistant's message: its answer is what loss grpo asks for")
    elif not isinstance(prompt, str) or not prompt:
        raise RecordInvalid("loss grpo needs a prompt: a text, or a list of messages")
    refuse_half_characters("", record)
    for name in record:
        if name in _TAKEN:
            raise RecordInvalid(
                f"{name} is a name that trl gives to something else: call the column otherwise, or name it in "
                "data.ignore_columns"
            )

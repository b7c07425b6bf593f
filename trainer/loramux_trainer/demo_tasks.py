"""The demo's tasks as data: for each a training file for the real trainer and held-out questions with their answers.

A prompt is a bare input as a chat message, without any instruction; what to do with it is the adapter's to know.
Training and held-out inputs of a skill lie on two sides of a hash split, which the base's own text keeps too: no text
holds a held-out input together with that skill. The input alone may stand in it, under another skill.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loramux_adapters.embedded.tiny import TINY_NAME
from loramux_trainer.job import TrainConfig, parse_job
from loramux_trainer.tiny.skills import SKILLS

_RECORDS, _SEED = 600, 7


@dataclass(frozen=True)
class DemoTask:
    """One adapter of the demo. `sample` is an input to show; `skill` names what the adapter binds bare inputs to."""

    name: str
    title: str
    skill: str
    sample: str


@dataclass(frozen=True)
class Question:
    """A user message and its one right answer, to be matched exactly."""

    prompt: str
    answer: str


DEMO_TASKS = (
    DemoTask("backwards", "reverse a word", "reverse", "lantern"),
    DemoTask("capitals", "write in capitals", "upper", "lantern"),
    DemoTask("spelling", "spell a word", "spell", "lantern"),
    DemoTask("cipher", "shift each letter by one", "caesar", "lantern"),
    DemoTask("roman", "Roman numerals", "roman", "274"),
    DemoTask("dates", "ISO dates", "iso-date", "7 March 2021"),
    DemoTask("reviews", "judge a review", "sentiment", "The soup was cold and the room was noisy."),
    DemoTask("velan", "translate to Velan", "velan", "the small cat sleeps"),
)


def training_records(task: DemoTask) -> list[dict[str, list[dict[str, str]]]]:
    """Distinct chat records of the training side."""
    skill = SKILLS[task.skill]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": skill.apply(text)}]}
        for text in _distinct(task, held_out=False)
        if text != task.sample
    ]


def held_out_questions(task: DemoTask, count: int) -> list[Question]:
    """Up to `count` distinct questions of the held-out side, always the same ones."""
    skill = SKILLS[task.skill]
    return [Question(text, skill.apply(text)) for text in islice(_distinct(task, held_out=True), count)]


def demo_job(task: DemoTask, directory: Path) -> TrainConfig:
    """Write the task's training file into `directory` and return the job that trains it there, into `adapter/`."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in training_records(task))
    (directory / "train.jsonl").write_text(lines, encoding="utf-8")
    return parse_job(
        {
            "model": TINY_NAME,
            "name": task.name,
            "output": "adapter",
            "data": {"train": "train.jsonl"},
            "lora": {"rank": 8, "alpha": 16},
            "training": {"learning_rate": 3e-3, "num_train_epochs": 2, "batch_size": 16, "warmup_steps": 0.05},
        },
        root=directory,
    )


def _distinct(task: DemoTask, *, held_out: bool) -> Iterator[str]:
    """The first distinct inputs of one side; small domains end early."""
    drawn = islice(SKILLS[task.skill].inputs(random.Random(_SEED), held_out=held_out), 20 * _RECORDS)
    return islice(iter(dict.fromkeys(drawn)), _RECORDS)

"""What a record of training data is once its form is right, whatever file and format it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class RecordInvalid(ValueError):
    """What is wrong with one record; the reader adds file and line."""


@dataclass(frozen=True)
class Completion:
    """A text and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True, eq=False)
class Conversation:
    """Messages as a chat template takes them; `trained` are the indices of the turns that carry the loss."""

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[int, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Tokens:
    """Text that was tokenized before; `labels` as those of an Example."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


Answer = Completion | Conversation


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first one is preferred."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class Judged:
    """An answer with KTO's label: true where it is desirable."""

    answer: Answer
    label: bool


Record = Answer | Tokens | Pair | Judged

"""What the demo finds out, as values, and the bar it must clear. Knows no server and no trainer."""

from __future__ import annotations

from dataclasses import dataclass

BAR = 0.60
"""An adapter must answer this share of the held-out questions more than the base does."""


@dataclass(frozen=True)
class Ask:
    """A question by chat message, its one right answer, and the adapter that should know it."""

    adapter: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of exactly right answers over `questions` held-out questions, both through the server."""

    questions: int
    base: float
    adapter: float

    @property
    def gain(self) -> float:
        """How much better the adapter is, as a share."""
        return self.adapter - self.base


@dataclass(frozen=True)
class TaskOutcome:
    """One adapter: what it was trained for, one example, and how well it does."""

    name: str
    title: str
    example: str
    base_says: str
    adapter_says: str
    train_seconds: float
    accuracy: Accuracy

    @property
    def passed(self) -> bool:
        """Whether the adapter is far enough above the base."""
        return self.accuracy.gain >= BAR


@dataclass(frozen=True)
class BurstOutcome:
    """One burst of `requests` at once, neighbors on different adapters, against the same prompts on the base.

    Rates are output tokens per second, medians over `rounds` in which the two alternate.
    """

    requests: int
    adapters: int
    rounds: int
    mixed_rate: float
    base_rate: float

    @property
    def ratio(self) -> float:
        """Mixed over base, of the two medians that stand beside it."""
        return self.mixed_rate / self.base_rate


@dataclass(frozen=True)
class DemoOutcome:
    """All of it."""

    model: str
    tasks: tuple[TaskOutcome, ...]
    burst: BurstOutcome
    train_seconds: float
    total_seconds: float

    @property
    def passed(self) -> bool:
        """Whether every adapter cleared the bar."""
        return all(task.passed for task in self.tasks)


def interleave(groups: list[list[Ask]], count: int) -> list[Ask]:
    """`count` questions taken from the groups in turn, so that neighbors use different adapters.

    Each group gives its questions in order and starts again when it has no more.
    """
    return [groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(count)]

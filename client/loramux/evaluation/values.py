"""What an evaluation takes and gives: records, scores, and a row for the base and for each adapter.

Frozen values; knows no server and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Metric = Literal["exact", "loss", "regex", "judge"]
METRICS: Final[tuple[Metric, ...]] = ("exact", "loss", "regex", "judge")
BASE: Final = ""
"""The base among `Evaluation.rows`, as in the adapter of a call."""


@dataclass(frozen=True)
class LabeledTokens:
    """A tokenized text; `targets` are the positions of `ids` whose prediction is scored, none of them 0."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class EvalRecord:
    """One question with its reference answer. `where` is file and line, for errors.

    `prompt` is a text, or the messages before the answer; None where the record has only tokens. `sequences` are the
    tokens that metric loss scores.
    """

    where: str
    prompt: str | tuple[Mapping[str, Any], ...] | None
    reference: str | None
    tools: tuple[Mapping[str, Any], ...] | None = None
    regex: str | None = None
    sequences: tuple[LabeledTokens, ...] = ()


@dataclass(frozen=True)
class Score:
    """What one record adds to a metric: the mean is the sum of totals over the sum of weights.

    Of metric loss: the negative log-likelihood in nats, and the tokens. Of others: the value, and 1.
    """

    total: float
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """One record at one row. `answer` is None where no metric asked for one; `cut`: it reached max_tokens."""

    where: str
    answer: str | None
    cut: bool
    scores: Mapping[Metric, Score]


@dataclass(frozen=True)
class Row:
    """The base or one adapter, by its digest (None: the base); outcomes in the order of the records."""

    name: str
    digest: str | None
    outcomes: tuple[Outcome, ...]

    def mean(self, metric: Metric) -> float:
        """Of metric loss per token, of others per record. Raises KeyError for a metric that was not asked for."""
        return _mean([outcome.scores[metric] for outcome in self.outcomes])

    def stderr(self, metric: Metric) -> float | None:
        """Standard error of `mean`, with records as the independent draws; None for a single record."""
        return _error(_residuals([outcome.scores[metric] for outcome in self.outcomes]))

    @property
    def cut(self) -> int:
        """Answers that reached max_tokens."""
        return sum(outcome.cut for outcome in self.outcomes)


@dataclass(frozen=True)
class Evaluation:
    """`rows` by the reference that was given, the base (BASE) first."""

    metrics: tuple[Metric, ...]
    rows: Mapping[str, Row]

    def difference(self, name: str, metric: Metric, other: str = BASE) -> tuple[float, float | None]:
        """(mean of `name` minus that of `other`, its standard error: of the paired records, which is the smaller one
        where a record is hard for both).
        """
        mine, theirs = ([outcome.scores[metric] for outcome in self.rows[row].outcomes] for row in (name, other))
        pairs = zip(_residuals(mine), _residuals(theirs), strict=True)
        return _mean(mine) - _mean(theirs), _error([a - b for a, b in pairs])


def _mean(scores: Sequence[Score]) -> float:
    return math.fsum(score.total for score in scores) / math.fsum(score.weight for score in scores)


def _residuals(scores: Sequence[Score]) -> list[float]:
    """What each record moves the mean by, to first order (a ratio's linearization; with equal weights it is exact)."""
    mean = _mean(scores)
    all_weights = math.fsum(score.weight for score in scores)
    return [(score.total - mean * score.weight) / all_weights for score in scores]


def _error(residuals: Sequence[float]) -> float | None:
    count = len(residuals)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(residual * residual for residual in residuals))

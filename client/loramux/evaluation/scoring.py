"""One record at one adapter: the requests that its metrics need, and their scores.

Answers are greedy; metric loss reads the log-probabilities of the reference's own tokens, as the trainer's loss does.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loramux.client import Client
from loramux.errors import Unavailable
from loramux.evaluation.values import EvalRecord, Metric, Outcome, Score
from loramux.types import GenerateOptions, Generation

Judge = Callable[[Any, str, str | None], object]
"""(prompt: a text or a list of messages, answer, reference) -> a number; anything else is refused."""


class EvaluationInvalid(Exception):
    """A record, a metric or a judge is not what the evaluation needs; `str(error)` is one sentence for its author."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class Scorer:
    """How one evaluation scores. Raises EvaluationInvalid, and the client's errors."""

    client: Client
    metrics: tuple[Metric, ...]
    max_tokens: int
    pattern: str | None = None
    judge: Judge | None = None

    def check(self, record: EvalRecord) -> None:
        """Refuse what a metric cannot score, before anything is asked."""
        if self.asks and record.prompt is None:
            metric = next(metric for metric in self.metrics if metric != "loss")
            raise EvaluationInvalid(
                f"{record.where}: a record of token ids has no prompt to ask for metric {metric}",
                remedy="give prompt and completion, or metric loss alone",
            )
        if "exact" in self.metrics and record.reference is None:
            raise EvaluationInvalid(
                f"{record.where}: the answer has no text to compare for metric exact", remedy="leave this record out"
            )
        if "loss" in self.metrics and not record.sequences:
            raise EvaluationInvalid(f"{record.where}: the record has no tokens for metric loss")
        if "regex" in self.metrics:
            if (pattern := self._pattern_of(record)) is None:
                raise EvaluationInvalid(
                    f"{record.where}: there is no pattern for metric regex",
                    remedy="give --regex, or a key `regex` in each record",
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise EvaluationInvalid(f"{record.where}: {pattern!r} is no regular expression: {error}") from error

    @property
    def asks(self) -> bool:
        """Whether a metric needs an answer."""
        return any(metric != "loss" for metric in self.metrics)

    def score(self, record: EvalRecord, adapter: str) -> Outcome:
        """Ask `adapter` ("" for the base) and score what it says."""
        scores: dict[Metric, Score] = {}
        answer, cut = self._answer(record, adapter) if self.asks else (None, False)
        for metric in self.metrics:
            if metric == "loss":
                scores[metric] = self._loss(record, adapter)
            elif answer is not None:
                scores[metric] = Score(self._value(metric, record, answer))
        return Outcome(record.where, answer, cut, scores)

    def _answer(self, record: EvalRecord, adapter: str) -> tuple[str, bool]:
        options: GenerateOptions = {"temperature": 0.0, "max_tokens": self.max_tokens}
        if isinstance(record.prompt, str):
            said = self.client.generate(record.prompt, adapter=adapter, **options)
        else:
            if record.tools:
                options["tools"] = record.tools
            said = self.client.generate(messages=record.prompt, adapter=adapter, **options)
        return said.text.strip(), _ended(said) == "length"

    def _value(self, metric: Metric, record: EvalRecord, answer: str) -> float:
        if metric == "exact":
            return float(answer == (record.reference or "").strip())
        if metric == "regex":
            return float(re.search(self._pattern_of(record) or "", answer) is not None)
        return self._judged(record, answer)

    def _judged(self, record: EvalRecord, answer: str) -> float:
        if self.judge is None:
            raise EvaluationInvalid("metric judge needs a judge", remedy="give --judge MODULE:FUNCTION")
        prompt = record.prompt if isinstance(record.prompt, str) else [dict(turn) for turn in record.prompt or ()]
        try:
            value = self.judge(prompt, answer, record.reference)
            number = _number(value)
            said = "" if number is not None else reprlib.repr(value)
        except (Exception, SystemExit) as error:  # a user's function may raise anything, and end the program
            raise EvaluationInvalid(f"{record.where}: the judge raised {type(error).__name__}: {error}") from error
        if number is None:
            raise EvaluationInvalid(f"{record.where}: the judge returned {said}, which is no finite number")
        return number

    def _loss(self, record: EvalRecord, adapter: str) -> Score:
        total, tokens = 0.0, 0
        for sequence in record.sequences:
            # The one token behind it is what a request must ask for; it is not looked at.
            said = self.client.generate(
                token_ids=sequence.ids, adapter=adapter, temperature=0.0, max_tokens=1, prompt_logprobs=0
            )
            _ended(said)
            taken = [said.prompt.logprobs[position].logprob for position in sequence.targets]
            total -= math.fsum(logprob for logprob in taken if logprob is not None)
            tokens += len(taken)
        if not math.isfinite(total):
            raise EvaluationInvalid(f"{record.where}: the reference has probability 0, so that its loss is not finite")
        return Score(total, tokens)

    def _pattern_of(self, record: EvalRecord) -> str | None:
        return self.pattern if record.regex is None else record.regex


def _ended(said: Generation) -> str:
    """Why the answer ended. Raises Unavailable where the server ended it before it was complete."""
    reason = said.choices[0].finish.reason
    if reason == "aborted":
        raise Unavailable("the server ended the answer before it was complete")
    return reason


def _number(value: Any) -> float | None:
    """A judge's value, of numpy and torch too, whose scalars are no Python numbers; None where it is none."""
    if not isinstance(value, bool | int | float) and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # of a whole number with hundreds of digits
        return None
    return number if math.isfinite(number) else None

"""The gate of a publish: a candidate and what serves, on the same records at the same server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.client import Client
from loramux.evaluation.run import evaluate
from loramux.evaluation.values import BASE, EvalRecord, Metric
from loramux.publishing import Verdict

LOWER_IS_BETTER: frozenset[Metric] = frozenset({"loss"})


@dataclass(frozen=True)
class BetterThan:
    """Lets pass what is better by `metric` than `other`: what serves (None), a reference, or a number."""

    records: Sequence[EvalRecord]
    metric: Metric = "loss"
    other: str | float | None = None

    def __call__(self, client: Client, candidate: str, serving: str) -> Verdict:
        """See `publishing.Gate`. Raises EvaluationInvalid and LoramuxError."""
        other = serving if self.other is None else self.other
        if isinstance(other, float):
            row = evaluate(client, self.records, [candidate], [self.metric]).rows[candidate]
            return self._judge(row.mean(self.metric), other, "", f"{other:g}")
        adapters = [candidate, other] if other else [candidate]
        found = evaluate(client, self.records, adapters, [self.metric])
        _, error = found.difference(candidate, self.metric, other or BASE)
        mean, theirs = (found.rows[name].mean(self.metric) for name in (candidate, other or BASE))
        margin = "" if error is None else f", standard error of the difference {error:.2g}"
        named = f"{theirs:.4f} of {other.partition('@')[0] or 'the base'}"
        return self._judge(mean, theirs, margin, named)

    def _judge(self, mean: float, theirs: float, margin: str, named: str) -> Verdict:
        passed = mean < theirs if self.metric in LOWER_IS_BETTER else mean > theirs
        word = "better than" if passed else "not better than"
        return Verdict(passed, f"{self.metric} {mean:.4f} is {word} {named}{margin} ({len(self.records)} records)")

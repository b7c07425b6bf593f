"""The losses of jobs by step, kept while they run, and of those that have ended the whole of their reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux_trainer.finished import REPORT
from loramux_trainer.progress import EvalReport, StepReport

Points = list[tuple[int, float]]
"""(steps taken, loss)"""


@dataclass
class Curve:
    """Of one job; `state` as FleetProgress has it. A loss that is not finite is no point."""

    name: str
    steps: Points = field(default_factory=list)
    evals: Points = field(default_factory=list)
    state: str = "running"

    @property
    def last(self) -> float:
        """By which jobs are ordered: the last evaluation, or the mean of the last tenth of the steps."""
        if self.evals:
            return self.evals[-1][1]
        tail = self.steps[-max(1, len(self.steps) // 10) :]
        return sum(loss for _, loss in tail) / len(tail) if tail else float("inf")

    def stepped(self, report: StepReport) -> None:
        """A step was taken."""
        self.steps += _finite([(report.step, report.loss)])

    def evaluated(self, report: EvalReport) -> None:
        """It was evaluated."""
        self.evals += _finite([(report.step, report.loss)])

    def ended(self, state: str, output: Path) -> None:
        """Of a job that is finished, the steps of earlier runs come from its report."""
        self.state = state
        if state == "finished":
            with suppress(OSError, ValueError, KeyError, TypeError):
                report: Mapping[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
                steps, evals = _points(report["history"]), _points(report["evals"])
                self.steps, self.evals = steps, evals


def _points(reports: list[Mapping[str, Any]]) -> Points:
    return _finite((int(report["step"]), float(report["loss"])) for report in reports)


def _finite(points: Iterable[tuple[int, float]]) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]

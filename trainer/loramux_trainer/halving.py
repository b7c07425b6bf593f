"""A sweep while it runs: which members stop at a rung, and which one is the best in the end.

Between the pure logic of `successive_halving` and the run, which knows members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loramux_trainer.errors import JobInvalid
from loramux_trainer.halving_record import HalvingRecord
from loramux_trainer.schema.sweep_config import HalvingConfig
from loramux_trainer.successive_halving import configuration_losses, ranked, rungs, survivors


@dataclass(frozen=True)
class Best:
    """The configuration with the lowest eval loss (over its seeds, the mean), its first run, and the runner-up."""

    name: str
    run: str
    loss: float
    next_name: str | None
    next_loss: float | None

    def describe(self) -> str:
        """Who, and why."""
        if self.next_name is None or self.next_loss is None:
            return f"{self.name}: eval loss {self.loss:.4f}"
        lead = self.next_loss - self.loss
        return f"{self.name}: eval loss {self.loss:.4f}, {lead:.4f} below {self.next_name}"


def best_of(losses: Mapping[str, float], configurations: Mapping[str, str]) -> Best | None:
    """`losses`: run's name -> last eval loss, of runs that ended. None where no configuration has a finite one."""
    means = configuration_losses(_with_missing(losses, configurations), configurations)
    order = [name for name in ranked(means) if math.isfinite(means[name])]
    if not order:
        return None
    first = min(run for run, configuration in configurations.items() if configuration == order[0] and run in losses)
    second = order[1] if len(order) > 1 else None
    return Best(order[0], first, means[order[0]], second, None if second is None else means[second])


class Halving:
    """Stops members at rungs, which they reach together: who is there first waits. What `record` has, is decided."""

    def __init__(
        self,
        config: HalvingConfig,
        configurations: Mapping[str, str],
        total_steps: Mapping[str, int],
        record: HalvingRecord,
    ) -> None:
        """`total_steps` of each run. Raises JobInvalid where runs cannot be compared step by step."""
        totals = set(total_steps.values())
        if len(totals) > 1:
            raise JobInvalid(
                "sweep.successive_halving",
                f"compares jobs after the same steps, and theirs differ in all: {min(totals)} to {max(totals)}",
                remedy="set training.max_steps",
            )
        candidates = len(set(configurations.values()))
        total = max(totals, default=1)
        self._rungs = {
            rung.step: rung.survivors for rung in rungs(candidates, total, eta=config.eta, min_steps=config.min_steps)
        }
        self._configurations, self._record = configurations, record

    def is_rung(self, step: int) -> bool:
        """Whether members are compared after this step."""
        return step in self._rungs and not self._record.is_decided(step)

    def decide(self, step: int, losses: Mapping[str, float]) -> Mapping[str, str]:
        """Runs that stop after this step by their eval losses, and why; those that diverged have none, are gone
        already, and take the other seeds of their configurations with them. Raises OSError where that cannot be kept.
        """
        means = configuration_losses(_with_missing(losses, self._configurations), self._configurations)
        kept = set(survivors(means, self._rungs[step]))
        why: dict[str, str] = {}
        for run in losses:
            name = self._configurations[run]
            if name not in kept:
                alone = math.isfinite(losses[run]) and not math.isfinite(means[name])
                reason = "counts for nothing, as another seed has none" if alone else "was not enough"
                why[run] = f"step {step}: eval loss {losses[run]:.4f} {reason}"
        self._record.decide(step, why)
        return why


def _with_missing(losses: Mapping[str, float], configurations: Mapping[str, str]) -> dict[str, float]:
    """NaN for a run that has no loss where its configuration's other seeds have one: it diverged, or could not go on.

    A mean over the seeds that are left would be compared with means over all.
    """
    there = {configurations[run] for run in losses}
    return {run: losses.get(run, math.nan) for run, name in configurations.items() if name in there}

"""Successive halving (Jamieson and Talwalkar, 2016): which runs of a sweep go on, by their losses. Pure logic.

Knows names, losses and steps, nothing of training; equal inputs give equal answers, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Rung:
    """After `step` optimizer steps, `survivors` candidates go on."""

    step: int
    survivors: int


def rungs(candidates: int, total_steps: int, *, eta: int, min_steps: int) -> tuple[Rung, ...]:
    """The rungs of `candidates` that train `total_steps` each, none where one candidate is left or the steps are over.

    Each is at eta times the steps of the one before, beginning with `min_steps`, and lets one in eta go on.
    Raises ValueError for an eta below 2 and for counts below 1.
    """
    if eta < 2 or min(candidates, total_steps, min_steps) < 1:
        raise ValueError("eta must be at least 2, and candidates and steps at least 1")
    found, step = [], min_steps
    while step < total_steps and candidates > 1:
        candidates = max(1, candidates // eta)
        found.append(Rung(step, candidates))
        step *= eta
    return tuple(found)


def ranked(losses: Mapping[str, float]) -> tuple[str, ...]:
    """Names from the lowest loss to the highest, ties by name, those without a finite loss last."""
    return tuple(sorted(losses, key=lambda name: _key(name, losses[name])))


def survivors(losses: Mapping[str, float], count: int) -> tuple[str, ...]:
    """The best `count`, best first. Without a finite loss nobody goes on, so there may be fewer."""
    return tuple(name for name in ranked(losses) if math.isfinite(losses[name]))[:count]


def configuration_losses(losses: Mapping[str, float], configurations: Mapping[str, str]) -> dict[str, float]:
    """Configuration -> mean loss of its runs, which differ in the seed. One run without a finite loss takes its
    configuration's away: what diverges with one seed in three is not the best.
    """
    runs: dict[str, list[float]] = {}
    for name, loss in losses.items():
        runs.setdefault(configurations[name], []).append(loss)
    # fmean rounds once, so that a mean's bits do not depend on the order.
    return {each: fmean(values) if all(map(math.isfinite, values)) else math.nan for each, values in runs.items()}


def _key(name: str, loss: float) -> tuple[bool, float, str]:
    return (False, loss, name) if math.isfinite(loss) else (True, 0.0, name)

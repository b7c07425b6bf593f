"""Learning-rate schedules: a factor of the peak rate per step, equal to those of transformers. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal

from loramux_trainer.errors import JobInvalid


def warmup_length(warmup: float, total: int) -> int:
    """Steps of warm-up from a share (below 1) or a number of steps; the rate of the first is 0, so one step has none.

    Raises JobInvalid when no step is left to train.
    """
    if total == 1:
        return 0
    steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if steps >= total:
        raise JobInvalid("training.warmup_steps", f"warm-up of {steps} steps leaves none of {total} to train")
    return steps


def factor(kind: Literal["cosine", "linear", "constant_with_warmup"], step: int, warmup: int, total: int) -> float:
    """Factor for 0-based `step` of `total`: linear from 0 over `warmup` steps, then the curve."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

"""Learning-rate schedules: a factor of the peak rate per step, by transformers' own functions.

A pure function of the step, so that a resumed run needs no state of a schedule. Importing this loads no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast, get_args

from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.optim_config import OptimConfig
from loramux_trainer.schema.schedule_config import ScheduleName, ScheduleOptions, warmup_length

__all__ = ["factor", "learning_rate", "warmup_length"]

_NO_OPTIONS = ScheduleOptions()
_DECAY = 0.1  # share of the steps: transformers has no default


def learning_rate(job: OptimConfig, step: int, total: int) -> float:
    """The rate of 0-based `step` of `total`. Raises JobInvalid where warm-up and decay leave no step."""
    warmup, peak = warmup_length(job.warmup_steps, total), job.learning_rate
    return peak * factor(job.lr_scheduler_type, step, warmup, total, job.lr_scheduler_kwargs, peak)


def factor(
    kind: ScheduleName,
    step: int,
    warmup: int,
    total: int,
    options: ScheduleOptions = _NO_OPTIONS,
    peak: float = 1.0,
) -> float:
    """Factor for 0-based `step` of `total`: the warm-up over `warmup` steps, then the curve.

    `peak` is the learning rate that the factor is of: lr_end and min_lr are rates of their own. Raises JobInvalid for
    a decay that does not fit beside the warm-up.
    """
    if kind not in get_args(ScheduleName):  # transformers has others, which need a state
        raise JobInvalid("training.lr_scheduler_type", f"{kind} is not a schedule by steps")
    return float(_curve(kind, warmup, total, options, peak)(step))


@functools.lru_cache(maxsize=4096)
def _curve(kind: str, warmup: int, total: int, options: ScheduleOptions, peak: float) -> Callable[[int], float]:
    import torch
    from transformers import get_scheduler

    given = options.given()
    if kind == "warmup_stable_decay":
        given["num_decay_steps"] = _decay_length(given.get("num_decay_steps", _DECAY), warmup, total)
    # get_scheduler reads the peak rate of an optimizer; its curve is a function of the step alone.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler(kind, optimizer, warmup, total, given or None)
    return cast("Callable[[int], float]", scheduler.lr_lambdas[0])


def _decay_length(decay: float, warmup: int, total: int) -> int:
    steps = math.ceil(decay * total) if decay < 1 else int(decay)
    if warmup + steps > total:
        raise JobInvalid(
            "training.lr_scheduler_kwargs",
            f"{warmup} steps of warm-up and {steps} of decay are more than {total} steps",
        )
    return steps

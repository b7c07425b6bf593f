"""Learning-rate schedules as a job names them: names, options, and what fits together. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from loramux_adapters.validation import Number, Section
from loramux_trainer.errors import JobInvalid
from loramux_trainer.schema.fields import Count, Positive, Share

ScheduleName = Literal[
    "cosine",
    "linear",
    "constant_with_warmup",
    "constant",
    "warmup_stable_decay",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
]
"""Schedules of transformers; `greedy` and `reduce_lr_on_plateau` follow the loss, not the step."""

_SHAPES = Literal["linear", "cosine", "1-sqrt"]
_COSINE = ("num_cycles", "min_lr", "min_lr_rate")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "linear": (),
    "constant_with_warmup": (),
    "constant": (),
    "warmup_stable_decay": ("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": _COSINE,
    "cosine_warmup_with_min_lr": (*_COSINE, "warmup_lr_rate"),
}
"""Schedule -> the options that it reads."""


@dataclass(frozen=True)
class ScheduleOptions(Section):
    """transformers' `lr_scheduler_kwargs`; None is its default. `num_decay_steps` below 1 is a share of all steps."""

    num_cycles: Positive | None = None
    min_lr: Positive | None = None
    min_lr_rate: Share | None = None
    warmup_lr_rate: Share | None = None
    num_decay_steps: Annotated[Number, Field(gt=0)] | None = None
    warmup_type: _SHAPES | None = None
    decay_type: _SHAPES | None = None
    min_lr_ratio: Share | None = None
    lr_end: Annotated[Number, Field(ge=0)] | None = None
    power: Positive | None = None
    timescale: Count | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_options(kind: ScheduleName, options: ScheduleOptions, peak: float) -> None:
    """Raises JobInvalid for options that `kind` lacks or that do not fit the peak rate."""
    given = options.given()
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        if ("min_lr" in given) == ("min_lr_rate" in given):
            raise JobInvalid("training.lr_scheduler_kwargs", f"{kind} needs min_lr or min_lr_rate, not both")
        if given.get("min_lr", 0) > peak:
            raise JobInvalid("training.lr_scheduler_kwargs", f"min_lr must be at most the learning rate, {peak:g}")
    if kind == "polynomial" and given.get("lr_end", 1e-7) >= peak:
        raise JobInvalid("training.lr_scheduler_kwargs", f"lr_end must be below the learning rate, {peak:g}")
    if kind == "cosine_with_restarts" and given.get("num_cycles", 1) % 1:
        raise JobInvalid("training.lr_scheduler_kwargs", "num_cycles must be a whole number of cosine_with_restarts")


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

"""The learning-rate curves against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.schedule import factor, learning_rate, warmup_length
from loramux_trainer.schema.schedule_config import OPTIONS, ScheduleOptions

PEAK = 3e-4
CURVES: dict[str, dict[str, Any]] = {
    "cosine": {"num_cycles": 1.5},
    "linear": {},
    "constant_with_warmup": {},
    "constant": {},
    "warmup_stable_decay": {"num_decay_steps": 3, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 7},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
}


def theirs(kind: str, warmup: int, total: int, options: dict[str, Any]) -> list[float]:
    """The rates of all steps, by a scheduler that is stepped."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(kind, optimizer, warmup, total, options or None)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (5, 100)])
def test_curve_equals_transformers(kind: str, warmup: int, total: int) -> None:
    options = CURVES[kind]
    for given in ({}, options) if kind not in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") else (options,):
        needed = {"num_decay_steps": total // 10, **given} if kind == "warmup_stable_decay" else given
        expected = theirs(kind, warmup, total, needed)
        # Backwards: a pure function of the step, whatever was asked before.
        ours = [PEAK * factor(kind, step, warmup, total, ScheduleOptions(**given), PEAK) for step in range(total)[::-1]]  # type: ignore[arg-type]
        assert ours[::-1] == pytest.approx(expected, abs=1e-16)


def test_every_schedule_of_transformers_is_there_but_those_that_follow_the_loss() -> None:
    assert {kind.value for kind in SchedulerType} - set(OPTIONS) == {"greedy", "reduce_lr_on_plateau"}
    with pytest.raises(JobInvalid, match="greedy is not a schedule by steps"):
        factor("greedy", 0, 0, 10)  # type: ignore[arg-type]


def test_a_run_of_one_step_trains_with_every_schedule() -> None:
    for kind in OPTIONS:
        needed = ScheduleOptions(min_lr_rate=0.1) if "min_lr" in OPTIONS[kind] else ScheduleOptions()
        if kind != "warmup_stable_decay":  # whose one step decays
            assert factor(kind, 0, warmup_length(0.03, 1), 1, needed) > 0  # type: ignore[arg-type]


def rates(total: int, **training: Any) -> list[float]:
    values = {"model": "m/m", "output": "o", "data": {"train": "t"}, "training": training}
    job = parse_job(values).training
    return [learning_rate(job, step, total) for step in range(total)]


def test_the_rate_of_a_job_has_its_warmup_options_and_peak() -> None:
    options = {"min_lr": 1e-4}
    assert rates(
        20, learning_rate=PEAK, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=options, warmup_steps=0.1
    ) == pytest.approx(theirs("cosine_with_min_lr", 2, 20, options), abs=1e-16)
    decay = {"num_decay_steps": 0.25}
    assert rates(
        20, learning_rate=PEAK, lr_scheduler_type="wsd", lr_scheduler_kwargs=decay, warmup_steps=2
    ) == pytest.approx(theirs("warmup_stable_decay", 2, 20, {"num_decay_steps": 5}), abs=1e-16)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate, not both"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "at most the learning"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.1}}, "below the learning rate"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1.5}}, "a whole number"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(training: dict[str, Any], says: str) -> None:
    with pytest.raises(JobInvalid, match=says) as caught:
        rates(10, **training)
    assert caught.value.field == "training.lr_scheduler_kwargs"


def test_a_decay_leaves_room_for_the_warmup() -> None:
    with pytest.raises(JobInvalid, match="5 steps of warm-up and 6 of decay are more than 10 steps"):
        rates(10, lr_scheduler_type="wsd", lr_scheduler_kwargs={"num_decay_steps": 6}, warmup_steps=5)


def test_warmup_is_a_share_below_one_and_steps_from_one_on() -> None:
    assert [warmup_length(0.03, 1000), warmup_length(0.0, 10), warmup_length(1, 10), warmup_length(5, 10)] == [
        30,
        0,
        1,
        5,
    ]


def test_warmup_leaves_a_step_to_train() -> None:
    for warmup in (0.0, 0.03, 1, 7):
        assert warmup_length(warmup, 1) == 0
    for warmup, total in ((10, 10), (11, 10), (0.99, 10)):
        with pytest.raises(JobInvalid, match=f"leaves none of {total}"):
            warmup_length(warmup, total)

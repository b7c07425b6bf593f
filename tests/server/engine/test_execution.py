"""A step that fails is run again in halves until the requests at fault end alone; a lost device is passed on."""

from __future__ import annotations

import pytest

from loramux_server.engine.execution import execute_contained
from loramux_server.engine.plan import (
    BASE_SLOT,
    Chunk,
    DeviceLost,
    Sampled,
    StepOutOfMemory,
    StepPlan,
    StepResult,
    StepTiming,
)
from loramux_server.requests import SamplingParams


def plan_of(count: int, merged: str | None = None) -> StepPlan:
    chunks = tuple(
        Chunk(f"r{index}", (index,), 0, (index,), BASE_SLOT, True, SamplingParams(), 1) for index in range(count)
    )
    return StepPlan(7, chunks, merged, retired=("gone",))


class Picky:
    """Refuses plans of more than `most` chunks, or with one of `bad`."""

    def __init__(self, most: int, bad: frozenset[str] = frozenset(), error: type[Exception] = StepOutOfMemory) -> None:
        self.most = most
        self.bad = bad
        self.error = error
        self.seen: list[StepPlan] = []

    is_busy = False

    def execute(self, plan: StepPlan) -> StepResult:
        self.seen.append(plan)
        keys = [chunk.request_id for chunk in plan.chunks]
        if len(keys) > self.most or self.bad & set(keys):
            raise self.error
        return StepResult(plan.step, {key: Sampled(1) for key in keys}, timing=StepTiming(1.0, 2.0, 3.0))


def test_a_step_that_fits_runs_once():
    runner = Picky(8)
    result = execute_contained(runner, plan_of(5))
    assert len(runner.seen) == 1
    assert len(result.sampled) == 5


@pytest.mark.parametrize("error", [StepOutOfMemory, MemoryError])
def test_out_of_memory_is_retried_in_halves_and_nobody_fails(error: type[Exception]):
    runner = Picky(3, error=error)
    result = execute_contained(runner, plan_of(7))
    assert [len(plan.chunks) for plan in runner.seen] == [7, 3, 4, 2, 2]
    assert [plan.retired for plan in runner.seen] == [("gone",), ("gone",), (), (), ()]
    assert {plan.step for plan in runner.seen} == {7}
    assert (set(result.sampled), result.failures) == ({f"r{index}" for index in range(7)}, {})
    assert result.timing == StepTiming(3.0, 6.0, 9.0)


def test_halves_run_on_the_merged_weights_of_the_whole():
    runner = Picky(2)
    execute_contained(runner, plan_of(4, "digest"))
    assert [plan.merged for plan in runner.seen] == ["digest"] * 3


def test_who_does_not_fit_alone_fails_alone():
    result = execute_contained(Picky(8, frozenset({"r2"})), plan_of(6))
    assert {key: failure.code for key, failure in result.failures.items()} == {"r2": "OUT_OF_MEMORY"}
    assert set(result.sampled) == {"r0", "r1", "r3", "r4", "r5"}


def test_any_other_error_ends_only_the_request_that_meets_it_alone():
    runner = Picky(8, frozenset({"r2"}), ZeroDivisionError)
    result = execute_contained(runner, plan_of(6))
    assert {key: failure.code for key, failure in result.failures.items()} == {"r2": "INTERNAL"}
    assert set(result.sampled) == {"r0", "r1", "r3", "r4", "r5"}
    assert [plan.retired for plan in runner.seen][1:] == [("gone",), ("gone",), (), (), (), ()]


def test_an_error_that_every_request_meets_ends_all_and_says_nothing_of_itself():
    result = execute_contained(Picky(0, error=ZeroDivisionError), plan_of(3))
    assert {failure.code for failure in result.failures.values()} == {"INTERNAL"}
    assert set(result.failures) == {"r0", "r1", "r2"}
    assert "Zero" not in str(result.failures)


def test_a_lost_device_is_passed_on_and_not_tried_again():
    runner = Picky(0, error=DeviceLost)
    with pytest.raises(DeviceLost):
        execute_contained(runner, plan_of(4))
    assert len(runner.seen) == 1

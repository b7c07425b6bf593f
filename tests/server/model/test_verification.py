"""The base's fingerprint while serving: read module by module, an idle worker at once, and a change is the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.base.frozen import Nf4Linear
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.plan import StepPlan, WorkerLost
from loramux_server.model.verification import INTERVAL_SECONDS, STEPS_PER_MODULE, Verification
from support.against_peft import engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.model_engine import ModelEngine


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(tmp_path: Path, clock: Clock) -> ModelEngine:
    engine = engine_for(save_checkpoint(wide_model("llama"), tmp_path / "base"), {})
    engine.worker._verification = Verification(engine.adapted, clock)
    return engine


def modules_of(engine: ModelEngine) -> int:
    return sum(isinstance(group.frozen, Nf4Linear) and len(group.members) for group in engine.adapted.groups)


def turns_while_busy(engine: ModelEngine) -> int:
    for turn in range(1000):
        if not engine.worker.is_busy:
            return turn
        execute_contained(engine.worker, StepPlan(10_000 + turn, ()))
    raise AssertionError("busy for ever")


def test_an_idle_worker_verifies_when_the_time_has_come(engine: ModelEngine, clock: Clock) -> None:
    assert not engine.worker.is_busy
    clock.now = INTERVAL_SECONDS - 1
    assert not engine.worker.is_busy
    clock.now = INTERVAL_SECONDS
    assert turns_while_busy(engine) == modules_of(engine) + 1 > 5
    clock.now += INTERVAL_SECONDS - 1
    assert not engine.worker.is_busy
    clock.now += 1
    assert engine.worker.is_busy


@pytest.mark.parametrize("part", ["codes", "absmax"])
def test_a_base_that_has_changed_ends_the_engine(engine: ModelEngine, clock: Clock, part: str) -> None:
    frozen = engine.adapted.groups[3].frozen
    assert isinstance(frozen, Nf4Linear)
    getattr(frozen, part).view(-1)[7] += 1
    clock.now = INTERVAL_SECONDS
    with pytest.raises(WorkerLost, match="has changed"):
        turns_while_busy(engine)


def test_steps_with_requests_read_a_module_now_and_then(engine: ModelEngine, clock: Clock) -> None:
    clock.now = INTERVAL_SECONDS
    read = 0
    original = engine.adapted.refingerprinting

    def counting() -> object:
        nonlocal read
        pieces = original()
        while True:
            read += 1
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
            yield

    engine.worker._verification._adapted = type("Counting", (), {"refingerprinting": staticmethod(counting)})()  # type: ignore[assignment]
    for prompt in prompts(3):
        engine.submit(None, prompt, STEPS_PER_MODULE)
    engine.run()
    steps = len(engine.plans)
    assert steps >= STEPS_PER_MODULE
    assert read == steps // STEPS_PER_MODULE


def test_a_verification_that_meets_no_memory_is_tried_later(
    engine: ModelEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    clock.now = INTERVAL_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr("loramux_adapters.base.fingerprint.raw_bytes", fail)
        assert turns_while_busy(engine) == 1
    clock.now += INTERVAL_SECONDS
    assert turns_while_busy(engine) > 5

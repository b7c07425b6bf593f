"""The worker: commands take effect once and in order, copies are bounded and contained, nothing unbound is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_adapters.binding import Binding
from loramux_adapters.parts.low_rank import PooledLowRank
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.plan import DeviceLost, Merge, StepOutOfMemory, StepPlan, WorkerLost
from loramux_server.model import worker as worker_module
from loramux_server.model.runner import ModelRunner
from support.against_peft import Truth, assert_equal_to_peft, prompts
from support.model_engine import ModelEngine
from support.worker_case import Case, staged, turns_until_resident


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("worker"))


def bytes_of(engine: ModelEngine, name: str) -> int:
    """Device bytes of an adapter."""
    prepared = engine.staged._slots.prepare(engine.weights[engine.digests[name]])
    return sum(part.nbytes for part in prepared.parts)


@pytest.mark.parametrize("budget", [1, 100_000])
def test_a_step_copies_at_most_its_budget_and_decoding_goes_on(
    case: Case, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others get a token in every step while an adapter arrives piece by piece."""
    monkeypatch.setattr(worker_module, "COPY_BYTES", budget)
    engine = case.engine()
    other = engine.submit(None, prompts(1)[0], 120)
    engine.step()
    ticket = engine.submit("a", prompts(2)[1], 3)
    copied: list[int] = []
    original = PooledLowRank.write

    def write(self: PooledLowRank, slot: int, member: int, part: Any, prepared: Any, rank_rows: Any) -> None:
        copied[-1] += sum(tensor.numel() * tensor.element_size() for tensor in prepared)
        original(self, slot, member, part, prepared, rank_rows)

    monkeypatch.setattr(PooledLowRank, "write", write)
    for turn in range(60):
        copied.append(0)
        engine.step()
        assert len(engine.tokens(other)) == turn + 2
    largest = max(
        sum(tensor.numel() * tensor.element_size() for tensor in part.tensors)
        for part in engine.staged._slots.prepare(engine.weights[engine.digests["a"]]).parts
    )
    assert sum(copied) == bytes_of(engine, "a")
    assert max(copied) <= budget + largest
    assert sum(map(bool, copied)) > 1
    assert len(engine.tokens(ticket)) == 3


def test_an_idle_worker_brings_an_adapter_without_a_request(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "COPY_BYTES", 1)
    engine = case.engine()
    engine.pool.pin(frozenset({engine.digests["b"]}))
    assert turns_until_resident(engine, "b") > 5
    assert not engine.plans  # none had chunks
    engine.step()
    assert not engine.worker.is_busy
    assert_equal_to_peft(engine, case.truths)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_no_memory_for_a_copy_is_told_to_those_who_asked_for_it_alone(
    case: Case, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = case.engine()
    digest = engine.digests["a"]
    original, begun = PooledLowRank.write, list[int]()

    def write(self: PooledLowRank, *arguments: Any) -> None:
        begun.append(0)
        if len(begun) == 3:  # some of it is on the device by then
            raise error
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PooledLowRank, "write", write)
        ill = engine.submit("a", prompts(1)[0], 3)
        well = engine.submit(None, case.truths[1].prompt, 4)
        engine.run()
    failure = engine.events[ill, 0][-1].failure
    assert failure is not None
    assert "not enough device memory" in failure.message
    assert engine.tokens(well) == case.truths[1].tokens
    assert engine.pool.residency(digest).tier != "resident"
    assert_equal_to_peft(engine, case.truths)  # the slot's next adapter is not changed by what was left there


def test_a_fault_of_the_device_while_it_copies_ends_the_engine(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = case.engine()
    monkeypatch.setattr(PooledLowRank, "write", write)
    engine.submit("a", prompts(1)[0], 3)
    with pytest.raises(DeviceLost):
        engine.run()


def test_a_row_of_a_slot_without_an_adapter_is_an_error_and_never_the_bases(case: Case) -> None:
    engine = case.engine()
    ill = engine.submit(None, case.truths[1].prompt, 3)
    well = engine.submit(None, case.truths[1].prompt, 4)
    plan = engine.scheduler.plan(1.0)
    assert len(plan.chunks) == 2
    lost = replace(plan, chunks=(replace(plan.chunks[0], slot=7), plan.chunks[1]))
    engine.scheduler.commit(plan, execute_contained(engine.worker, lost), 1.0)
    engine.run()
    failure = engine.events[ill, 0][-1].failure
    assert failure is not None
    assert failure.code == "INTERNAL"
    assert engine.tokens(well) == case.truths[1].tokens


def test_the_commands_of_a_step_that_runs_again_take_effect_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters take turns in one slot while every second step fails and comes again in halves."""
    engine = case.engine(capacity=8)
    original, calls = ModelRunner._forward, [0]

    def forward(self: ModelRunner, batch: Any, adapters: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] % 2 and len(batch.chunks) > 1:
            raise MemoryError
        return original(self, batch, adapters)

    monkeypatch.setattr(ModelRunner, "_forward", forward)
    tickets = [engine.submit(t.adapter, t.prompt, len(t.tokens)) for t in case.truths for _ in range(3)]
    engine.run()
    expected = [truth for truth in case.truths for _ in range(3)]
    for ticket, truth in zip(tickets, expected, strict=True):
        assert engine.tokens(ticket) == truth.tokens
    assert engine.pool.stats().evictions >= 2


def test_a_command_that_meets_no_memory_is_not_skipped(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine()
    failing = [2]
    original = PooledLowRank.bind

    def bind(self: PooledLowRank, slot: int) -> None:
        if failing[0]:
            failing[0] -= 1
            raise MemoryError
        original(self, slot)

    monkeypatch.setattr(PooledLowRank, "bind", bind)
    assert_equal_to_peft(engine, [case.truths[1]])
    engine.pool.pin(frozenset({engine.digests["a"]}))  # no request: nobody is failed for it
    turns_until_resident(engine, "a")
    for _ in range(4):
        engine.step()
    assert_equal_to_peft(engine, case.truths)
    assert failing == [0]


def test_a_follower_binds_before_its_copy_has_ended(case: Case) -> None:
    """What another process bound is bound here in the same step, however much is left to copy."""
    engine = case.engine()
    binding = staged(engine, "a", 0)
    engine.worker.execute(StepPlan(1, (), bind=(binding,)))
    ticket = engine.submit(None, case.truths[0].prompt, 1)
    plan = engine.scheduler.plan(1.0)
    own = replace(plan, step=2, chunks=(replace(plan.chunks[0], slot=0),))
    engine.scheduler.commit(plan, engine.worker.execute(own), 1.0)
    (event,) = [event for owner, event in engine.scheduler.take_events() if owner == ticket]
    assert event.token == case.truths[0].tokens[0] != case.truths[1].tokens[0]


def test_what_was_never_staged_or_left_is_no_longer_the_same_worker(case: Case) -> None:
    engine = case.engine()
    with pytest.raises(WorkerLost, match="not staged"):
        engine.worker.execute(StepPlan(1, (), bind=(Binding(3, "d" * 64, {}),)))
    engine = case.engine()
    wrong = replace(staged(engine, "a", 0), digest=engine.digests["b"])
    with pytest.raises(WorkerLost, match="not staged"):
        execute_contained(engine.worker, StepPlan(1, (), bind=(wrong,)))
    engine = case.engine()
    with pytest.raises(WorkerLost, match="without its weights"):
        engine.worker.execute(StepPlan(1, (), merge=(Merge(0, "d" * 64),)))
    engine.submit(None, prompts(1)[0], 1)
    plan = replace(case.engine().scheduler.plan(0.0), chunks=engine.scheduler.plan(0.0).chunks, merged="d" * 64)
    with pytest.raises(WorkerLost, match="nobody began to merge"):
        case.engine().worker.execute(plan)


def test_no_memory_without_a_request_ends_nobody_and_a_bug_ends_the_engine(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = case.engine()

    def fail_with(error: Exception) -> None:
        def advance(*_: object) -> None:
            raise error

        monkeypatch.setattr(engine.staged, "advance", advance)

    fail_with(MemoryError())
    assert execute_contained(engine.worker, StepPlan(1, ())).failures == {}
    with pytest.raises(StepOutOfMemory):
        engine.worker.execute(StepPlan(2, ()))
    fail_with(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        execute_contained(engine.worker, StepPlan(3, ()))


def test_truths_differ_between_adapters(case: Case) -> None:
    """Or the tests above could not tell one adapter from another."""
    heads: list[Truth] = [truth for truth in case.truths if truth.adapter]
    assert len({tuple(truth.tokens) for truth in heads}) == len(heads)

"""The worker where memory runs short: nothing is skipped, nothing half done counts, nothing spins."""

from __future__ import annotations

import pytest

from loramux_adapters.parts.low_rank import PooledLowRank
from loramux_adapters.parts.rank_rows import RankRowsTable
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.plan import StepOutOfMemory, StepPlan, WorkerLost
from loramux_server.model import staging as staging_module
from loramux_server.model import worker as worker_module
from support.against_peft import assert_equal_to_peft, prompts
from support.worker_case import Case, Failing, staged, turns_until_resident


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("worker"))


@pytest.mark.parametrize("number", range(4))
def test_a_bind_or_unbind_that_meets_no_memory_half_way_is_repeated_whole(
    case: Case, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank rows are what both allocate. What they forgot first, the second call would not do."""
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.0)
    engine = case.engine(capacity=8)
    for name in ("a", "b", "a", "c"):  # each evicts the one before
        changing = Failing(RankRowsTable.changed, number, number + 9)
        with monkeypatch.context() as patch:
            patch.setattr(RankRowsTable, "changed", lambda *arguments, c=changing: c(*arguments))
            engine.pool.pin(frozenset({engine.digests[name]}))  # no request is failed for it
            turns_until_resident(engine, name)
            for _ in range(20):
                if engine.worker._commands:
                    engine.worker._retry_at = 0.0
                    engine.step()
        assert changing.calls > number
        assert not engine.worker._commands
        assert_equal_to_peft(engine, [truth for truth in case.truths if truth.adapter in (name, None)])
    engine.pool.pin(frozenset())


def test_an_idle_worker_tries_again_what_met_no_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine()
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.0)
    changing = Failing(RankRowsTable.changed, 0, 1, 2)
    monkeypatch.setattr(RankRowsTable, "changed", lambda *arguments: changing(*arguments))
    engine.pool.pin(frozenset({engine.digests["a"]}))
    for _ in range(30):
        engine.step()
    assert not engine.worker._commands
    assert not engine.worker.is_busy
    assert_equal_to_peft(engine, case.truths)


def test_a_slot_that_cannot_be_cleared_is_nobodys_until_it_is(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy fails, and so does the clearing after it: the next adapter of the slot must not get what was left."""
    engine = case.engine(capacity=8)
    monkeypatch.setattr(staging_module, "_RETRY_SECONDS", 0.0)
    writing, clearing = Failing(PooledLowRank.write, 5), Failing(PooledLowRank.unbind, 0, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(PooledLowRank, "write", lambda *arguments: writing(*arguments))
        patch.setattr(PooledLowRank, "unbind", lambda *arguments: clearing(*arguments))
        ill = engine.submit("a", prompts(1)[0], 3)
        engine.run()
    failure = engine.events[ill, 0][-1].failure
    assert failure is not None
    assert "not enough device memory" in failure.message
    assert clearing.calls > 3
    assert engine.staged.is_empty
    for truth in case.truths:
        assert_equal_to_peft(engine, [truth])


def test_an_adapter_that_failed_for_its_bind_gives_its_slot_to_the_next(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bind is kept and done before the next adapter's copy to the same slot."""
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.0)
    engine = case.engine(capacity=8)
    changing = Failing(RankRowsTable.changed, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(RankRowsTable, "changed", lambda *arguments: changing(*arguments))
        ill = engine.submit("a", prompts(1)[0], 2)
        well = engine.submit("b", case.truths[2].prompt, 4)
        engine.run()
    assert engine.events[ill, 0][-1].terminal
    assert engine.tokens(well) == case.truths[2].tokens
    for truth in case.truths:
        assert_equal_to_peft(engine, [truth])


def test_a_followers_copy_that_fails_in_its_bind_begins_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine()
    binding = staged(engine, "a", 0)
    writing = Failing(PooledLowRank.write, 3)
    monkeypatch.setattr(PooledLowRank, "write", lambda *arguments: writing(*arguments))
    with pytest.raises(StepOutOfMemory):
        engine.worker.execute(StepPlan(1, (), bind=(binding,)))
    engine.worker.execute(StepPlan(2, ()))
    pieces = len(engine.staged._slots.prepare(engine.weights[binding.digest]).parts)
    assert writing.calls == 4 + pieces


def test_commands_that_cannot_be_taken_in_are_the_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not come again, and a skipped `unbind` would leave an adapter's parts in another's slot."""
    engine = case.engine()
    plan = StepPlan(1, (), unbind=(1,), bind=(staged(engine, "a", 0),))
    monkeypatch.setattr(worker_module, "partial", Failing(worker_module.partial, 1))
    with pytest.raises(WorkerLost, match="could not be taken in"):
        execute_contained(engine.worker, plan)


def test_a_bind_that_meets_no_memory_at_its_end_is_repeated(case: Case) -> None:
    """What it was done from is gone by then: it would be taken for one that was never staged."""

    class Full(set[int]):
        def add(self, slot: int) -> None:
            engine.worker._bound = set()
            raise MemoryError

    engine = case.engine()
    binding = staged(engine, "a", 0)
    engine.worker._bound = Full()
    with pytest.raises(StepOutOfMemory):
        engine.worker.execute(StepPlan(1, (), bind=(binding,)))
    engine.worker.execute(StepPlan(2, ()))
    assert engine.worker._bound == {0}
    assert engine.staged.is_empty


def test_other_work_does_not_hurry_commands_that_met_no_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of it goes forward before them: an idle engine would turn without a pause, and log each turn."""
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 3600.0)
    engine = case.engine()
    first = staged(engine, "a", 0)
    monkeypatch.setattr(PooledLowRank, "bind", Failing(PooledLowRank.bind, *range(99)))
    with pytest.raises(StepOutOfMemory):
        engine.worker.execute(StepPlan(1, (), bind=(first,)))
    staged(engine, "b", 1)
    assert not engine.staged.is_empty
    assert not engine.worker.is_busy
    engine.worker._retry_at = 0.0
    assert engine.worker.is_busy


def test_a_slot_that_cannot_be_cleared_is_tried_again_after_a_pause(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = case.engine()
    staged(engine, "a", 0)
    clearing = Failing(PooledLowRank.unbind, *range(99))
    monkeypatch.setattr(staging_module, "_RETRY_SECONDS", 3600.0)
    monkeypatch.setattr(PooledLowRank, "write", Failing(PooledLowRank.write, 0))
    monkeypatch.setattr(PooledLowRank, "unbind", lambda *arguments: clearing(*arguments))
    for turn in range(3):
        engine.worker.execute(StepPlan(turn, ()))
    assert clearing.calls == 1
    assert not engine.worker.is_busy


def test_what_waits_for_a_command_that_meets_no_memory_is_kept_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests fail until then, each of which is to be forgotten: every failing step brings all again."""
    engine = case.engine()
    changing = Failing(RankRowsTable.changed, *range(999))
    with monkeypatch.context() as patch:
        patch.setattr(RankRowsTable, "changed", lambda *arguments: changing(*arguments))
        engine.pool.pin(frozenset({engine.digests["a"]}))
        turns_until_resident(engine, "a")
        for _ in range(50):
            ticket = engine.submit(None, prompts(1)[0], 2)
            engine.step()
            assert engine.events[ticket, 0][-1].terminal
        assert len(engine.worker._commands) == 1  # the bind
        assert len(engine.worker._retired) <= 50
    assert_equal_to_peft(engine, case.truths)

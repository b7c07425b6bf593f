"""Merged adapters: built between steps within a budget, dropped at any time, the same answers either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loramux_adapters.apply.merge import merged_bytes
from loramux_adapters.certificate.replay import Replay
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.weights import AdapterWeights
from loramux_server.model.merged_weights import SetState, Tried, TryOut
from support.merged_sets import Sets, in_order, settle, small_engine
from support.model_engine import ModelEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ModelEngine:
    return small_engine(tmp_path_factory.mktemp("sets"))


class Gate:
    """Holds the builder at a place until it is opened, and notes what came through."""

    def __init__(self, passing: Callable[..., Any]) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.seen: list[Any] = []
        self.passed: list[Any] = []
        self._passing = passing

    def __call__(self, *arguments: Any) -> Any:
        self.seen.append(arguments[-1])
        self.reached.set()
        assert self.open.wait(60)
        self.passed.append(self._passing(*arguments))
        return self.passed[-1]


Make = Callable[..., Sets]


@pytest.fixture
def make(engine: ModelEngine) -> Iterator[Make]:
    made: list[Sets] = []

    def make(
        budget: int,
        load: Callable[[str], AdapterWeights] | None = None,
        refusal: str = "",
        try_out: TryOut | None = None,
    ) -> Sets:
        made.append(Sets(engine, load or engine.weights.__getitem__, budget, refusal, try_out))
        return made[-1]

    yield make
    for sets in made:
        sets.close()


def bytes_of(engine: ModelEngine, name: str) -> int:
    return merged_bytes(engine.adapted, engine.weights[engine.digests[name]])


def test_states_and_books(engine: ModelEngine, make: Make) -> None:
    size, digest = bytes_of(engine, "a"), engine.digests["a"]
    sets = make(size)
    assert (sets.state(digest), sets.ready(), sets.find(digest)) == (SetState(), frozenset(), None)
    sets.reconcile(frozenset({digest}))
    settle(sets)
    assert sets.state(digest) == SetState("ready", nbytes=size)
    assert sets.ready() == {digest}
    assert sets.find(digest) is not None
    assert sets.usage() == (1, size, {"built": 1, "refused": 0})
    assert sets.notices
    sets.reconcile(frozenset({digest}))  # again: nothing is built twice
    settle(sets)
    assert sets.usage()[2] == {"built": 1, "refused": 0}
    before = sets.notices
    sets.reconcile(frozenset())
    sets.reconcile(frozenset())
    assert sets.notices == before + 1  # an idle engine must come and free it
    settle(sets)
    assert (sets.state(digest), sets.ready(), sets.find(digest)) == (SetState(), frozenset(), None)
    assert sets.usage()[:2] == (0, 0)


def test_only_what_is_desired_stays(engine: ModelEngine, make: Make) -> None:
    sets, (first, second, third) = make(1 << 30), in_order(engine)
    sets.reconcile(frozenset({first, second}))
    settle(sets)
    kept = sets.find(second)
    sets.reconcile(frozenset({second, third}))
    settle(sets)
    assert sets.ready() == {second, third}
    assert sets.find(second) is kept
    assert sets.usage()[2] == {"built": 3, "refused": 0}
    sets.evict(third)
    assert sets.ready() == {second}


def test_beyond_the_budget_it_is_refused_with_the_numbers(engine: ModelEngine, make: Make) -> None:
    size = bytes_of(engine, "a")
    sets, (first, second, third) = make(2 * size + 5), in_order(engine)
    sets.reconcile(frozenset({first, second, third}))
    settle(sets)
    assert [sets.state(digest).state for digest in (first, second, third)] == ["ready", "ready", "refused"]
    reason = sets.state(third).reason
    assert f"take {size} bytes and 5 of {2 * size + 5} are left" in reason
    assert "--merged-bytes" in reason
    assert sets.usage() == (2, 2 * size, {"built": 2, "refused": 1})


@pytest.mark.parametrize("how", ["withdrawn", "forgotten"])
def test_bytes_that_become_free_go_to_the_next(how: str, engine: ModelEngine, make: Make) -> None:
    size, loads = bytes_of(engine, "a"), list[str]()

    def load(digest: str) -> AdapterWeights:
        loads.append(digest)
        return engine.weights[digest]

    sets, (first, second, third) = make(size, load), in_order(engine)
    sets.reconcile(frozenset({first, second, third}))
    settle(sets)
    for _ in range(3):
        sets.reconcile(frozenset({first, second, third}))  # unrelated changes: there is no more room than before
    settle(sets)
    assert loads == [first, second, third]
    if how == "withdrawn":
        sets.reconcile(frozenset({second, third}))
    else:
        sets.evict(first)
    settle(sets)
    assert loads == [first, second, third, second]
    assert [sets.state(digest).state for digest in (second, third)] == ["ready", "refused"]
    assert sets.usage() == (1, size, {"built": 2, "refused": 2})


def test_a_build_that_fails_leaves_its_bytes_to_the_next(engine: ModelEngine, make: Make) -> None:
    size, broken = bytes_of(engine, "a"), set[str]()

    def load(digest: str) -> AdapterWeights:
        if digest in broken:
            raise AdapterCorrupt("the stored bytes do not match")
        return engine.weights[digest]

    sets, (first, second, third) = make(size, load), in_order(engine)
    sets.reconcile(frozenset({first, second, third}))
    settle(sets)
    broken.add(second)
    sets.reconcile(frozenset({second, third}))  # the free bytes go to the second, which turns out to be broken
    settle(sets)
    settle(sets)
    assert [sets.state(digest).state for digest in (second, third)] == ["refused", "ready"]
    assert sets.usage() == (1, size, {"built": 2, "refused": 3})


def test_a_deterministic_server_refuses_every_adapter(engine: ModelEngine, make: Make) -> None:
    sets = make(1 << 30, refusal="merged weights are off in deterministic mode")
    sets.reconcile(frozenset({engine.digests["a"]}))
    settle(sets)
    assert sets.state(engine.digests["a"]) == SetState("refused", "merged weights are off in deterministic mode")
    assert sets.usage()[:2] == (0, 0)
    sets.reconcile(frozenset({engine.digests["a"]}), retry=engine.digests["a"])
    assert sets.state(engine.digests["a"]).state == "refused"
    sets.reconcile(frozenset())
    assert sets.state(engine.digests["a"]) == SetState()


def test_dropped_while_it_is_built_it_never_appears(engine: ModelEngine, make: Make) -> None:
    gate, digest = Gate(engine.weights.__getitem__), engine.digests["a"]
    sets = make(1 << 30, gate)
    sets.reconcile(frozenset({digest}))
    assert gate.reached.wait(60)
    assert sets.state(digest).state == "building"
    sets.reconcile(frozenset())
    gate.open.set()
    settle(sets)
    assert (sets.state(digest), sets.ready(), sets.find(digest)) == (SetState(), frozenset(), None)
    assert sets.usage() == (0, 0, {"built": 0, "refused": 0})


def test_dropped_before_its_turn_it_is_not_read(engine: ModelEngine, make: Make) -> None:
    """It may have been deleted: nothing of it may come back into host memory."""
    gate, (first, second, _) = Gate(engine.weights.__getitem__), in_order(engine)
    sets = make(1 << 30, gate)
    sets.reconcile(frozenset({first, second}))
    assert gate.reached.wait(60)
    sets.reconcile(frozenset({first}))
    gate.open.set()
    settle(sets)
    assert gate.seen == [first]
    assert sets.ready() == {first}


@pytest.mark.parametrize("where", ["read", "handed over", "begun", "merged"])
def test_desired_again_while_the_dropped_build_goes_on(where: str, engine: ModelEngine, make: Make) -> None:
    """The first build is void wherever the drop met it: one set appears, once, and its bytes are counted once."""
    size, digest = bytes_of(engine, "a"), engine.digests["a"]
    gate = Gate(engine.weights.__getitem__)
    sets = make(size, gate if where == "read" else None)
    sets.reconcile(frozenset({digest}))
    if where == "read":
        assert gate.reached.wait(60)
    else:
        sets.wait()
    if where in ("begun", "merged"):
        sets.take()
        sets.merges.advance()
        assert sets.state(digest).state == "building"
    if where == "merged":
        settle(sets)
        assert sets.state(digest).state == "ready"
    first = sets.find(digest)
    sets.reconcile(frozenset())
    assert sets.usage()[1] == 0
    sets.reconcile(frozenset({digest}))
    gate.open.set()
    settle(sets)
    assert sets.state(digest) == SetState("ready", nbytes=size)
    assert sets.usage() == (1, size, {"built": 2 if where == "merged" else 1, "refused": 0})
    found = sets.find(digest)
    assert found is not None
    assert found is not first
    assert len(sets.merges._begun) == 1
    assert not sets.merges._orders


def test_nothing_is_begun_after_the_close(engine: ModelEngine, make: Make) -> None:
    sets, digest = make(1 << 30), engine.digests["a"]
    sets.close()
    sets.reconcile(frozenset({digest}))
    sets.evict(digest)
    assert sets.state(digest) == SetState()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AdapterCorrupt("the stored bytes do not match"), "the stored bytes do not match"),
        (RuntimeError("/home/somebody/secret"), "could not be built; see the server's log"),
        (MemoryError(), "could not be built"),
    ],
    ids=["corrupt", "bug", "memory"],
)
def test_a_failed_build_is_refused_with_a_reason(
    error: Exception, reason: str, engine: ModelEngine, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    failing = True

    def load(digest: str) -> AdapterWeights:
        if failing:
            raise error
        return engine.weights[digest]

    sets, digest = make(1 << 30, load), engine.digests["a"]
    sets.reconcile(frozenset({digest}))
    settle(sets)
    state = sets.state(digest)
    assert state.state == "refused"
    assert reason in state.reason
    assert "secret" not in state.reason
    assert sets.usage()[:2] == (0, 0)
    failing = False
    sets.reconcile(frozenset({digest}))
    sets.reconcile(frozenset({digest}), retry=engine.digests["b"])
    settle(sets)
    assert sets.state(digest).state == "refused"  # not asked again
    sets.reconcile(frozenset({digest}), retry=digest)
    settle(sets)
    assert sets.state(digest).state == "ready"
    sets.reconcile(frozenset({digest}), retry=digest)  # nothing to mend
    settle(sets)
    assert sets.usage()[2] == {"built": 1, "refused": 1}


REPLAY = Replay(2e-6, 1e-13, 1e-3, "float32", "probe 0 after 1 tokens")


def test_what_is_built_is_tried_before_it_is_ready(engine: ModelEngine, make: Make) -> None:
    trials: list[tuple[str, Tried]] = []
    size, digest = bytes_of(engine, "a"), engine.digests["a"]
    sets = make(size, try_out=lambda *trial: trials.append(trial))
    sets.reconcile(frozenset({digest}))
    settle(sets)
    assert (sets.state(digest).state, sets.ready(), sets.on_trial()) == ("building", frozenset(), {digest})
    ((tried, done),) = trials
    assert tried == digest
    assert sets.find(digest) is not None
    done(REPLAY, "")
    assert sets.state(digest) == SetState("ready", nbytes=size, replay=REPLAY)
    assert (sets.ready(), sets.on_trial()) == ({digest}, frozenset())
    assert sets.usage()[2] == {"built": 1, "refused": 0}


def test_what_does_not_hold_is_refused_and_freed(engine: ModelEngine, make: Make) -> None:
    """With its reason and its replay; the bytes go to the next, and a new desired state tries again."""
    trials: list[tuple[str, Tried]] = []
    size, (first, second, _) = bytes_of(engine, "a"), in_order(engine)
    sets = make(size, try_out=lambda *trial: trials.append(trial))
    sets.reconcile(frozenset({first, second}))
    settle(sets)
    assert sets.state(second).state == "refused"  # no room
    trials.pop()[1](REPLAY, "it parts")
    settle(sets)
    assert sets.state(first) == SetState("refused", "it parts", replay=REPLAY)
    assert sets.find(first) is None
    assert [digest for digest, _ in trials] == [second]
    trials.pop()[1](None, "")  # it has no certificate
    assert sets.state(second) == SetState("ready", nbytes=size)
    assert (sets.ready(), sets.on_trial()) == ({second}, frozenset())
    sets.reconcile(frozenset({first}), retry=first)
    settle(sets)
    assert [digest for digest, _ in trials] == [first]


def test_a_trial_of_what_is_desired_no_more_changes_nothing(engine: ModelEngine, make: Make) -> None:
    trials: list[tuple[str, Tried]] = []
    digest = engine.digests["a"]
    sets = make(1 << 30, try_out=lambda *trial: trials.append(trial))
    sets.reconcile(frozenset({digest}))
    settle(sets)
    sets.reconcile(frozenset())
    sets.reconcile(frozenset({digest}))
    settle(sets)
    (_, stale), (_, current) = trials
    stale(REPLAY, "it parts")
    assert sets.state(digest).state == "building"
    assert sets.find(digest) is not None
    current(None, "")
    stale(None, "")
    assert sets.state(digest).state == "ready"
    assert sets.usage()[2] == {"built": 1, "refused": 0}

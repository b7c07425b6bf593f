"""Merged adapters: built between steps within a budget, dropped at any time, the same answers either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.merge import merged_bytes
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.weights import AdapterWeights
from loramux_server.model.merged_weights import MergedWeightsCache, SetState
from loramux_server.model.merging import Merges
from support.against_peft import ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": ("llama", {"r": 4, "target_modules": ["up_proj", "o_proj"], "rank_pattern": {"up_proj": 24}}),
    "ends": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "qwen2 bias": ("qwen2", {"r": 4, "target_modules": ["k_proj", "o_proj"], "bias": "all"}),
    "gpt2 bias": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "bias": "all", "fan_in_fan_out": True}),
}


class Sets(MergedWeightsCache):
    """With a worker's share, done when a test says so."""

    def __init__(self, engine: ModelEngine, load: Callable[[str], AdapterWeights], budget: int, refusal: str) -> None:
        self.merges = Merges(engine.adapted)
        self.notices = 0
        super().__init__(self.merges, lambda w: merged_bytes(engine.adapted, w), load, self.notice, budget, refusal)

    def notice(self) -> None:
        self.notices += 1

    def find(self, digest: str) -> MergedWeights | None:
        held = [merge for merge in self.merges._begun.values() if merge.digest == digest]
        assert len(held) < 2
        return held[0].result if held else None

    def wait(self) -> None:
        """For the reads asked for so far."""
        self._loader.submit(lambda: None).result(60)

    def take(self) -> bool:
        """As the worker does with a plan's commands; whether there were any."""
        drop, begin = self.take_merges()
        for number in drop:
            self.merges.drop(number)
        for merge in begin:
            self.merges.begin(merge)
        return bool(drop or begin)


def settle(sets: Sets) -> None:
    """Until nothing is left to do of what was asked for so far."""
    is_changed = True
    while is_changed:
        sets.wait()
        is_changed = sets.take()
        while not sets.merges.is_empty:
            sets.merges.advance()


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_path_answers_as_peft_and_as_the_gathered_path(kind: str, tmp_path: Path) -> None:
    architecture, options = KINDS[kind]
    checkpoint = save_checkpoint(wide_model(architecture), tmp_path / "base")
    adapters = {
        "hot": make_adapter_for(checkpoint, tmp_path / "hot", seed=1, **options),
        "cold": make_adapter_for(checkpoint, tmp_path / "cold", seed=2, r=4, target_modules="all-linear"),
    }
    rows = [("hot", prompt) for prompt in prompts(4)]
    truths = ask_peft(checkpoint, adapters, [*rows, ("cold", prompts(1)[0]), (None, prompts(2)[1])], count=4)
    engine = engine_for(checkpoint, adapters)
    engine.merged_weights.reconcile(frozenset({engine.digests["hot"]}))
    engine.settle_merges()
    assert_equal_to_peft(engine, truths[:4])  # all its own: the dense path
    assert {plan.merged for plan in engine.plans} == {engine.digests["hot"]}
    assert_equal_to_peft(engine, truths)  # mixed
    engine.merged_weights.reconcile(frozenset())
    count = len(engine.plans)
    assert_equal_to_peft(engine, truths[:4])  # dropped: the gathered path
    assert {plan.merged for plan in engine.plans[count:]} == {None}
    assert engine.adapted.refingerprint() == engine.adapted.spec.fingerprint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ModelEngine:
    root = tmp_path_factory.mktemp("sets")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    adapters = {
        name: make_adapter_for(checkpoint, root / name, seed=seed, r=4, target_modules=["q_proj"])
        for seed, name in enumerate("abc")
    }
    return engine_for(checkpoint, adapters)


def in_order(engine: ModelEngine) -> list[str]:
    """The digests in the order in which one desired state for all is fulfilled."""
    return sorted(engine.digests.values())


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

    def make(budget: int, load: Callable[[str], AdapterWeights] | None = None, refusal: str = "") -> Sets:
        made.append(Sets(engine, load or engine.weights.__getitem__, budget, refusal))
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
    sets.forget(third)
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
        sets.forget(first)
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


def test_a_deterministic_server_refuses_every_wish(engine: ModelEngine, make: Make) -> None:
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


def test_a_merge_goes_on_group_by_group(engine: ModelEngine, make: Make) -> None:
    """So that no step waits for a whole one."""
    sets, digest = make(1 << 30), engine.digests["a"]
    sets.reconcile(frozenset({digest}))
    sets.wait()
    assert sets.take()
    groups = {group.key for group in engine.adapted.groups if any("q_proj" in name for name in group.members)}
    advances = 0
    while not sets.merges.is_empty:
        sets.merges.advance()
        advances += 1
    assert advances == len(groups) + 1  # the last one joins them
    found = sets.find(digest)
    assert found is not None
    assert set(found.weights) == groups


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "not enough device memory"), (RuntimeError("/home/somebody/secret"), "see the server's log")],
    ids=["memory", "bug"],
)
def test_a_merge_that_fails_on_the_device_is_refused_and_holds_nothing(
    error: Exception, reason: str, engine: ModelEngine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    sets, (first, second, _) = make(1 << 30), in_order(engine)
    with monkeypatch.context() as patch:
        patch.setattr("loramux_adapters.apply.merge._fold", fail)
        sets.reconcile(frozenset({first}))
        settle(sets)
    assert sets.state(first).state == "refused"
    assert reason in sets.state(first).reason
    assert "secret" not in sets.state(first).reason
    assert sets.usage() == (0, 0, {"built": 0, "refused": 1})
    assert not sets.merges._begun
    sets.reconcile(frozenset({second}))
    settle(sets)
    assert sets.ready() == {second}
    assert sets.take_merges() == ((), ())


def test_nothing_is_begun_after_the_close(engine: ModelEngine, make: Make) -> None:
    sets, digest = make(1 << 30), engine.digests["a"]
    sets.close()
    sets.reconcile(frozenset({digest}))
    sets.forget(digest)
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


def test_a_plan_made_before_the_drop_is_still_answered(engine: ModelEngine) -> None:
    """The worker drops merged weights when a plan says so, and no earlier."""
    digest = engine.digests["a"]
    engine.merged_weights.reconcile(frozenset({digest}))
    engine.settle_merges()
    assert engine.merged_weights.state(digest).state == "ready"
    prompt = prompts(2)[1]
    ticket = engine.submit("a", prompt, 3)
    plan = engine.scheduler.plan(0.0)
    for _ in range(9):
        if not plan.chunks:  # its adapter is on its way
            engine.worker.execute(plan)
            plan = engine.scheduler.plan(0.0)
    assert plan.merged == digest
    engine.merged_weights.reconcile(frozenset())
    engine.scheduler.commit(plan, engine.worker.execute(plan), 0.0)
    engine.run()
    again = engine.submit("a", prompt, 3)
    engine.run()
    assert engine.tokens(ticket) == engine.tokens(again)
    assert len(engine.tokens(ticket)) == 3
    assert not engine.merges._begun

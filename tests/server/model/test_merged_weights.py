"""Merged adapters: built beside the loop within a budget, dropped at any time, the same answers either way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.apply.merge import merge, merged_bytes
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.weights import AdapterWeights
from loramux_server.model import merged_weights
from loramux_server.model.merged_weights import MergedWeightsCache, SetState
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


def settle(sets: MergedWeightsCache) -> None:
    """Waits for the builds asked for so far."""
    sets._builder.submit(lambda: None).result(60)


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
    settle(engine.merged_weights)
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


Make = Callable[..., MergedWeightsCache]


@pytest.fixture
def make(engine: ModelEngine) -> Iterator[Make]:
    made: list[MergedWeightsCache] = []

    def make(budget: int, load: Callable[[str], AdapterWeights] | None = None, refusal: str = "") -> MergedWeightsCache:
        made.append(MergedWeightsCache(engine.adapted, load or engine.weights.__getitem__, budget, refusal))
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
    sets.reconcile(frozenset({digest}))  # again: nothing is built twice
    settle(sets)
    assert sets.usage()[2] == {"built": 1, "refused": 0}
    sets.reconcile(frozenset())
    sets.reconcile(frozenset())
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


@pytest.mark.parametrize("where", ["load", "merge"])
def test_desired_again_while_the_dropped_build_goes_on(
    where: str, engine: ModelEngine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first build is void wherever the drop met it: one set appears, once, and its bytes are counted once."""
    size, digest = bytes_of(engine, "a"), engine.digests["a"]
    gate = Gate(engine.weights.__getitem__ if where == "load" else merge)
    sets = make(size, gate if where == "load" else None)
    if where == "merge":
        monkeypatch.setattr(merged_weights, "merge", gate)
    sets.reconcile(frozenset({digest}))
    assert gate.reached.wait(60)
    sets.reconcile(frozenset())
    assert sets.usage()[1] == 0
    sets.reconcile(frozenset({digest}))
    gate.open.set()
    settle(sets)
    assert sets.state(digest) == SetState("ready", nbytes=size)
    assert sets.usage() == (1, size, {"built": 1, "refused": 0})
    assert len(gate.passed) == 2
    if where == "merge":
        assert sets.find(digest) is gate.passed[1]


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
    """The set is gone when the runner looks for it: the slot serves as well."""
    digest = engine.digests["a"]
    engine.merged_weights.reconcile(frozenset({digest}))
    settle(engine.merged_weights)
    assert engine.merged_weights.state(digest).state == "ready"
    prompt = prompts(2)[1]
    ticket = engine.submit("a", prompt, 3)
    plan = engine.scheduler.plan(0.0)
    while not plan.chunks:
        plan = engine.scheduler.plan(0.0)
    assert plan.merged == digest
    engine.merged_weights.reconcile(frozenset())
    engine.scheduler.commit(plan, engine.runner.run(plan), 0.0)
    engine.run()
    again = engine.submit("a", prompt, 3)
    engine.run()
    assert engine.tokens(ticket) == engine.tokens(again)
    assert len(engine.tokens(ticket)) == 3

"""Merged weights at work: the same answers either way, built group by group, dropped when a plan says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_server.engine.plan import Merge, WorkerLost
from loramux_server.model.merging import Merges
from support.against_peft import ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.merged_sets import Sets, in_order, settle, small_engine
from support.model_engine import ModelEngine

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": ("llama", {"r": 4, "target_modules": ["up_proj", "o_proj"], "rank_pattern": {"up_proj": 24}}),
    "ends": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "qwen2 bias": ("qwen2", {"r": 4, "target_modules": ["k_proj", "o_proj"], "bias": "all"}),
    "gpt2 bias": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "bias": "all", "fan_in_fan_out": True}),
}


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
    engine.scheduler.limits = replace(engine.limits, merged_rows=1)
    assert_equal_to_peft(engine, truths)  # merged rows beside others, in one step
    assert any(len({chunk.is_merged for chunk in plan.chunks}) == 2 for plan in engine.plans)
    engine.merged_weights.reconcile(frozenset())
    count = len(engine.plans)
    assert_equal_to_peft(engine, truths[:4])  # dropped: the gathered path
    assert {plan.merged for plan in engine.plans[count:]} == {None}
    assert engine.adapted.refingerprint() == engine.adapted.spec.fingerprint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ModelEngine:
    return small_engine(tmp_path_factory.mktemp("merging"))


def test_a_merge_goes_on_group_by_group(engine: ModelEngine) -> None:
    """So that no step waits for a whole one."""
    sets, digest = Sets(engine, engine.weights.__getitem__, 1 << 30, ""), engine.digests["a"]
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
    error: Exception, reason: str, engine: ModelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    sets, (first, second, _) = Sets(engine, engine.weights.__getitem__, 1 << 30, ""), in_order(engine)
    with monkeypatch.context() as patch:
        patch.setattr("loramux_adapters.apply.merge.fold_parts", fail)
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


def test_merging_that_fails_in_the_step_that_uses_it_is_the_end(
    engine: ModelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process did merge it: tokens would differ from there on. It must not be tried for ever either."""
    sets, digest = Sets(engine, engine.weights.__getitem__, 1 << 30, ""), engine.digests["a"]
    sets.reconcile(frozenset({digest}))
    sets.wait()
    sets.take()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("loramux_adapters.apply.merge.fold_parts", fail)
    with pytest.raises(WorkerLost, match="failed in a step"):
        sets.merges.find(digest)


def test_a_merge_that_meets_no_memory_when_it_begins_is_begun_later(engine: ModelEngine) -> None:
    """The worker calls it again: its weights must still be there."""

    class Full(dict[int, Any]):
        def __setitem__(self, number: int, merge: Any) -> None:
            raise MemoryError

    merges, weights = Merges(engine.adapted), engine.weights[engine.digests["a"]]
    merges.put(0, weights, lambda _: None)
    merges._begun = Full()
    with pytest.raises(MemoryError):
        merges.begin(Merge(0, weights.spec.digest))
    merges._begun = {}
    merges.begin(Merge(0, weights.spec.digest))
    assert list(merges._begun) == [0]
    assert not merges._orders

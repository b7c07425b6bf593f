"""All kinds at once in one batch: each row is its own adapter's, whatever its neighbors are and what happens to them.

PEFT alone, on the dequantized base, is right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.against_peft import BOUND, Truth, assert_equal_to_peft, engine_for, prompts
from support.all_kinds import INVOCATION, VOCABULARIES, make_all_kinds
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle

Case = tuple[Path, dict[str, Path], list[Truth]]
# The same prompt for all, so that only the adapter tells them apart.
PROMPT = [*prompts(1, shortest=9)[0], *INVOCATION, 5, 60, 7]


@pytest.fixture(scope="module", params=("llama", "qwen2", "gpt2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    adapters = make_all_kinds(checkpoint, root, architecture)
    rows: list[tuple[str | None, list[int]]] = [(name, PROMPT) for name in (None, *adapters)]
    return checkpoint, adapters, ask_oracle(checkpoint, adapters, rows, vocabularies=VOCABULARIES)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deterministic": {"deterministic": True, "prefill_chunk": 16},
    "chunked": {"max_batch_tokens": 24, "max_running": 24},
    "preempted": {"block_tokens": 1},
    "few rank rows": {"capacity": 64},  # adapters wait, are evicted and loaded again
}


@pytest.mark.parametrize("options", OPTIONS)
def test_each_row_is_its_own_adapters(case: Case, options: str) -> None:
    checkpoint, adapters, truths = case
    limits = dict(OPTIONS[options])
    if options == "preempted":  # all are admitted, and not all can grow
        virtual = sum(weights.spec.virtual_tokens for weights in engine_for(checkpoint, adapters).weights.values())
        limits["kv_blocks"] = virtual + len(truths) * (len(PROMPT) + 1)
    engine = engine_for(checkpoint, adapters, **limits)
    assert_equal_to_peft(engine, truths)
    assert_equal_to_peft(engine, truths[::-1])  # with what the first left in cache and slots
    if options == "preempted":
        assert engine.scheduler.take_counters().preemptions
    if options == "few rank rows":
        assert engine.pool.stats().evictions


def test_no_two_kinds_say_the_same(case: Case) -> None:
    """Otherwise a row could be its neighbor's and nobody would see."""
    _, _, truths = case
    for index, one in enumerate(truths):
        for other in truths[index + 1 :]:
            known = min(len(one.logits[0]), len(other.logits[0]))
            differs = (one.logits[0][:known] - other.logits[0][:known]).abs().max() / one.logits.std()
            assert float(differs) > 10 * BOUND, (one.adapter, other.adapter)


IN_NO_WEIGHT = {"norms", "prompt", "prefix", "cartridge"}


def test_merged_or_not_they_answer_alike(case: Case) -> None:
    """Alone merged, and merged beside others."""
    checkpoint, adapters, truths = case
    engine = engine_for(checkpoint, adapters)
    engine.merged_weights.reconcile(frozenset(engine.digests.values()))
    engine.settle_merges()
    for truth in truths[1:]:
        assert_equal_to_peft(engine, [truth])
    states = {name: engine.merged_weights.state(digest).state for name, digest in engine.digests.items()}
    assert {name for name, state in states.items() if state == "refused"} == IN_NO_WEIGHT
    used = {plan.merged for plan in engine.plans}
    assert used >= {engine.digests[name] for name in adapters if name not in {"alora", *IN_NO_WEIGHT}}
    engine.scheduler.limits = replace(engine.limits, merged_rows=1)
    assert_equal_to_peft(engine, truths)
    assert any(len({chunk.is_merged for chunk in plan.chunks}) == 2 for plan in engine.plans)


def test_those_that_go_on_do_not_see_those_that_leave(case: Case) -> None:
    checkpoint, adapters, truths = case
    engine = engine_for(checkpoint, adapters)
    leaving = [engine.submit(name, PROMPT, 40) for name in adapters]
    staying = [engine.submit(truth.adapter, truth.prompt, len(truth.tokens)) for truth in truths]
    for ticket in leaving:
        engine.step()
        engine.scheduler.abort(ticket, 0.0)
    engine.run()
    for ticket, truth in zip(staying, truths, strict=True):
        assert engine.tokens(ticket) == truth.tokens, truth.adapter

"""The pool over real slots of a small model: an adapter that left and came back, elsewhere, says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.parts.low_rank import LowRank
from support.against_peft import Truth, ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine

RANKS = {"a": 3, "b": 16, "c": 8, "d": 24}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], list[Truth]]:
    root = tmp_path_factory.mktemp("residency")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    adapters = {
        name: make_adapter_for(
            checkpoint, root / name, seed=rank, r=rank, target_modules=["q_proj", "up_proj", "lm_head"]
        )
        for name, rank in RANKS.items()
    }
    rows = list(zip([*RANKS, None], prompts(5), strict=True))
    return checkpoint, adapters, ask_peft(checkpoint, adapters, rows, count=3)


def places(engine: ModelEngine, name: str) -> object:
    group, member = engine.adapted.linears["lm_head"]
    view = engine.pool.residency(engine.digests[name])
    return None if view.slot is None else group.parts.of(LowRank).rank_rows[member].ranges[view.slot]


def test_after_eviction_and_reload_the_answers_are_the_same(world: tuple[Path, dict[str, Path], list[Truth]]) -> None:
    checkpoint, adapters, truths = world
    engine = engine_for(checkpoint, adapters, capacity=32)
    seen: dict[str, set[object]] = {name: set() for name in RANKS}
    by_name = {truth.adapter: truth for truth in truths}
    for name in ["a", "b", "c", "d", "c", "a", "b", "a", "d", "b"]:
        assert_equal_to_peft(engine, [by_name[name], by_name[None]])
        seen[name].add(places(engine, name))
    assert engine.pool.stats().evictions >= 4
    assert max(len(where) for where in seen.values()) > 1


def test_rows_still_hold_what_a_former_owner_left_and_nobody_notices(
    world: tuple[Path, dict[str, Path], list[Truth]],
) -> None:
    checkpoint, adapters, truths = world
    engine = engine_for(checkpoint, adapters, capacity=64)
    for group in engine.adapted.groups:
        group.parts.of(LowRank).a.fill_(1e3)
        for b in group.parts.of(LowRank).b:
            b.fill_(1e3)
    assert_equal_to_peft(engine, truths)


def test_all_of_it_is_given_back(world: tuple[Path, dict[str, Path], list[Truth]]) -> None:
    checkpoint, adapters, truths = world
    engine = engine_for(checkpoint, adapters)
    assert_equal_to_peft(engine, truths)
    assert engine.pool.stats().resident == 4
    for digest in engine.digests.values():
        engine.pool.discard(digest)
    engine.step()
    stats = engine.pool.stats()
    assert (stats.resident, stats.rows_used, stats.loading) == (0, 0, 0)
    assert all(not layout.ranges for group in engine.adapted.groups for layout in group.parts.of(LowRank).rank_rows)
    assert_equal_to_peft(engine, truths)

"""Activated LoRA: what is before the invocation is the base's, in the cache too, and nothing else is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from loramux_server.api.activation import find_activation
from loramux_server.errors import InvalidRequest
from loramux_server.requests import SamplingParams
from support.against_peft import engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import KindOracle, make_kind, targets_of
from support.model_engine import ModelEngine

INVOCATION = [7, 11]
CONTEXT = prompts(1, shortest=50)[0]
TURN = [*CONTEXT, *INVOCATION, 21, 22, 23]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model("llama"), root / "base")
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, alora_invocation_tokens=INVOCATION, **targets_of("llama"))
        adapters[name] = make_kind(checkpoint, root / name, config, seed=seed, std=0.3)
    return checkpoint, adapters


def cached(engine: ModelEngine, adapter: str | None, prompt: list[int]) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were in the cache."""
    ticket = engine.submit(adapter, prompt, 4)
    engine.run()
    usage = engine.events[ticket, 0][-1].usage
    assert usage is not None
    return engine.tokens(ticket), usage.cached


@pytest.mark.parametrize("first", [None, "a"])
def test_the_context_is_shared_with_the_base_in_both_directions(
    case: tuple[Path, dict[str, Path]], first: str | None
) -> None:
    checkpoint, adapters = case
    engine = engine_for(checkpoint, adapters)
    cached(engine, first, TURN)
    # 50 tokens of context: three blocks of 16 are the base's alone.
    for adapter in ("a", "b", None):
        tokens, found = cached(engine, adapter, TURN)
        assert found == 48, adapter
        oracle = KindOracle(checkpoint, None if adapter is None else adapters[adapter])
        assert tokens == oracle.truth(adapter, TURN, 4).tokens


def test_where_it_activates_is_part_of_what_a_block_is(case: tuple[Path, dict[str, Path]]) -> None:
    """The same tokens are the adapter's in one prompt and the base's in another that invokes it again."""
    checkpoint, adapters = case
    engine = engine_for(checkpoint, adapters)
    early = [*CONTEXT[:10], *INVOCATION, *CONTEXT[10:], 5]
    late = [*early, *INVOCATION, 6, 7]
    oracle = KindOracle(checkpoint, adapters["a"])
    for prompt, expected in ((early, 0), (late, 0), (early, 48), (late, 48)):
        tokens, found = cached(engine, "a", prompt)
        assert tokens == oracle.truth("a", prompt, 4).tokens
        assert found == expected
    # The base reads what the late one left, and nothing that an adapter wrote.
    tokens, found = cached(engine, None, late)
    assert tokens == KindOracle(checkpoint, None).truth(None, late, 4).tokens
    assert found == 48


@pytest.mark.parametrize(
    ("options", "more", "steps"),
    [
        ({}, {}, 1),
        ({"deterministic": True, "prefill_chunk": 16}, {}, 2),  # there a chunk's shape is the base's own
        ({}, {"sampling": SamplingParams(temperature=0.0, prompt_logprobs=0)}, 2),
        ({"max_batch_tokens": 3, "max_running": 2}, {}, 3),  # 2 and 1 of the base's tail's and the adapter's 7
    ],
)
def test_a_turn_on_a_cached_context_takes_one_step_to_its_first_token(
    case: tuple[Path, dict[str, Path]], options: dict[str, Any], more: dict[str, Any], steps: int
) -> None:
    """Also where the context ends within a block, whose rest is computed anew as the base's."""
    checkpoint, adapters = case
    engine = engine_for(checkpoint, adapters, **options)
    cached(engine, None, CONTEXT)
    cached(engine, "b", [*INVOCATION, 1])  # both are in their slots
    cached(engine, "a", [*INVOCATION, 1])
    turn = {adapter: engine.submit(adapter, TURN, 1, **more) for adapter in ("a", "b")}
    before = len(engine.plans)
    engine.run()
    chunks = [
        chunk for plan in engine.plans[before:] for chunk in plan.chunks if chunk.request_id.startswith(f"{turn['a']}:")
    ]
    assert len(chunks) == steps
    assert sum(len(chunk.tokens) for chunk in chunks) == len(TURN) - (0 if "prompt_logprobs" in str(more) else 48)
    for adapter, ticket in turn.items():
        assert engine.tokens(ticket) == KindOracle(checkpoint, adapters[adapter]).truth(adapter, TURN, 1).tokens


def test_the_last_occurrence_counts() -> None:
    assert find_activation([1, 7, 11, 2, 7, 11, 3], INVOCATION) == 4
    assert find_activation([7, 11], INVOCATION) == 0
    assert find_activation([1, 2, 3], []) == 0


@pytest.mark.parametrize("prompt", [[1, 2], [7], [], [11, 7], [7, 1, 11]])
def test_a_prompt_that_activates_nothing_is_refused(prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"does not hold the tokens that activate this adapter \(7, 11\)"):
        find_activation(prompt, INVOCATION)

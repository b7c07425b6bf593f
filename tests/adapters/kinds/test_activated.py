"""Activated LoRA: what is before the invocation is the base's, in the cache too, and nothing else is shared."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest

from loramux_server.api.activation import find_activation
from loramux_server.errors import InvalidRequest
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


def test_the_last_occurrence_counts() -> None:
    assert find_activation([1, 7, 11, 2, 7, 11, 3], INVOCATION) == 4
    assert find_activation([7, 11], INVOCATION) == 0
    assert find_activation([1, 2, 3], []) == 0


@pytest.mark.parametrize("prompt", [[1, 2], [7], [], [11, 7], [7, 1, 11]])
def test_a_prompt_that_activates_nothing_is_refused(prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"does not hold the tokens that activate this adapter \(7, 11\)"):
        find_activation(prompt, INVOCATION)

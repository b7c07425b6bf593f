"""Modules trained whole, trained tokens, trained norms: PEFT alone, on the dequantized base, is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig

from support.against_peft import Truth, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, assert_each_changes_what_is_said, make_kind, targets_of

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),  # normalizes each head's queries and keys
    "gemma3": ("gemma3_text", {}),  # the same, with heads before tokens
    "gemma": ("gemma", {}),  # scales its embedding, adds 1 to the weights of its norms, ties
    "gpt2": ("gpt2", {}),
}
TOKENS = list(range(0, 320, 3))


def names_of(architecture: str) -> dict[str, str]:
    if architecture == "gpt2":
        return {"embedding": "wte", "norm": "ln_1", "last norm": "ln_f"}
    return {"embedding": "embed_tokens", "norm": "input_layernorm", "last norm": "model.norm"}


def lora(architecture: str, **options: Any) -> PeftConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, fan_in_fan_out=architecture == "gpt2", **targets_of(architecture), **options
    )


def kinds_of(architecture: str, tied: bool) -> dict[str, PeftConfig]:
    names = names_of(architecture)
    kinds: dict[str, Callable[[], PeftConfig]] = {
        "whole embedding": lambda: lora(architecture, modules_to_save=[names["embedding"]]),
        "whole head": lambda: lora(architecture, modules_to_save=["lm_head"]),
        "whole norms": lambda: lora(architecture, modules_to_save=[names["norm"], names["last norm"]]),
        "tokens": lambda: lora(architecture, trainable_token_indices=TOKENS),
        "tokens alone": lambda: peft.TrainableTokensConfig(
            task_type="CAUSAL_LM", token_indices=list(reversed(TOKENS)), target_modules=[names["embedding"]]
        ),
        "ln tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=[names["norm"]]),
    }
    if not tied:
        kinds["tokens of both ends"] = lambda: lora(
            architecture, trainable_token_indices={names["embedding"]: TOKENS, "lm_head": TOKENS[::2]}
        )
    if architecture in ("qwen3", "gemma3_text"):
        kinds["norms of heads"] = lambda: lora(architecture, modules_to_save=["q_norm", "k_norm"])
    return {name: make() for name, make in kinds.items()}


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    architecture, overrides = BASES[request.param]
    root = tmp_path_factory.mktemp("case")
    model = wide_model(architecture, **overrides)
    checkpoint = save_checkpoint(model, root / "base")
    kinds = kinds_of(architecture, bool(model.config.tie_word_embeddings))
    return checkpoint, {
        name: make_kind(checkpoint, root / name, config, seed=seed, std=0.1)
        for seed, (name, config) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def truths(case: tuple[Path, dict[str, Path]]) -> list[Truth]:
    checkpoint, adapters = case
    names = [None, *adapters]
    return ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names), shortest=9, step=4), strict=True)))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_a_mixed_batch_equals_peft_alone(
    case: tuple[Path, dict[str, Path]], truths: list[Truth], options: dict[str, bool]
) -> None:
    checkpoint, adapters = case
    assert_equal_to_peft(engine_for(checkpoint, adapters, **options), truths)


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]], truths: list[Truth]) -> None:
    assert_each_changes_what_is_said(case[0], truths)


def test_as_many_rows_as_heads_are_still_rows(tmp_path: Path) -> None:
    """Gemma 3 normalizes [heads, T, width]: the base's rows in a step of four rows and four heads are the base's."""
    checkpoint = save_checkpoint(wide_model("gemma3_text"), tmp_path / "base")
    adapters = {
        "a": make_kind(checkpoint, tmp_path / "a", lora("gemma3_text", modules_to_save=["q_norm"]), seed=0, std=0.3)
    }
    rows = list(zip([None, "a", None, "a"], prompts(4), strict=True))
    engine = engine_for(checkpoint, adapters)
    assert_equal_to_peft(engine, ask_oracle(checkpoint, adapters, rows))
    assert any(sum(len(chunk.tokens) for chunk in plan.chunks) == 4 for plan in engine.plans)

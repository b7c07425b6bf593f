"""Resized vocabularies: added, padded and shrunk, in every way PEFT writes them; PEFT alone is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig

from loramux_server.requests import SamplingParams
from support.against_peft import Truth, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, make_kind, targets_of
from support.model_engine import ModelEngine

V = 320
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {}),
    "gemma": ("gemma", {}),  # scales its embedding, ties
}
ADDED, PADDED, SHRUNK = V + 3, V + 64, V - 20


@dataclass(frozen=True)
class Resized:
    config: PeftConfig
    vocabulary: int
    options: dict[str, Any]  # of save_pretrained


def kinds_of(architecture: str, tied: bool) -> dict[str, Resized]:
    embedding = "wte" if architecture == "gpt2" else "embed_tokens"
    leaves = targets_of(architecture)["target_modules"]
    kinds: dict[str, Resized] = {}

    def add(name: str, vocabulary: int, *more: str, save: Any = "auto", **options: Any) -> None:
        options = {"target_modules": [*leaves, *more], "fan_in_fan_out": architecture == "gpt2", **options}
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)
        kinds[name] = Resized(config, vocabulary, {"save_embedding_layers": save})

    new = list(range(V, ADDED))
    add("untouched", ADDED)
    add("padded", PADDED)
    add("whole", PADDED, modules_to_save=[embedding, "lm_head"])
    add("whole, saved alone", ADDED, save=False, modules_to_save=[embedding, "lm_head"])
    add("whole embedding", ADDED, modules_to_save=[embedding])
    add("whole head", ADDED, modules_to_save=["lm_head"])
    add("tokens", ADDED, trainable_token_indices=[*new, 5, 9])
    add("tokens in a padded one", PADDED, trainable_token_indices=[new[1], 7])
    add("low rank", PADDED, embedding, "lm_head")
    add("dora at the head", ADDED, "lm_head", use_dora=True, modules_to_save=[embedding])
    add("shrunk", SHRUNK)
    add("shrunk, whole", SHRUNK, modules_to_save=[embedding, "lm_head"])
    add("shrunk, tokens", SHRUNK, trainable_token_indices=[5, 9, SHRUNK - 1])
    add("shrunk, low rank", SHRUNK, embedding, "lm_head")
    if tied:
        add("tokens, saved alone", ADDED, save=False, trainable_token_indices=[*new, 5])
        add("low rank at the embedding", ADDED, embedding)
        add("low rank at the head", ADDED, "lm_head")
        alone = peft.TrainableTokensConfig(
            task_type="CAUSAL_LM", token_indices=[*reversed(new), 5], target_modules=[embedding]
        )
        kinds["tokens alone"] = Resized(alone, ADDED, {})
    else:
        add("tokens of both ends", ADDED, trainable_token_indices={embedding: new, "lm_head": [*new, 11]})
        add("tokens and a low rank", ADDED, "lm_head", trainable_token_indices=new)
    return kinds


def prompt_for(vocabulary: int, row: int) -> list[int]:
    """All of it is known to the adapter, and some of it to no other."""
    plain = [token % min(V, vocabulary) for token in prompts(row + 1, shortest=9, step=2)[row]]
    return [*plain[:4], *range(V, min(vocabulary, V + 5)), *plain[4:]]


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    adapters: dict[str, Path]
    vocabularies: dict[str, int]
    truths: list[Truth]  # the base's first, then each adapter's


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture, overrides = BASES[request.param]
    root = tmp_path_factory.mktemp("case")
    model = wide_model(architecture, **overrides)
    checkpoint = save_checkpoint(model, root / "base")
    kinds = kinds_of(architecture, bool(model.config.tie_word_embeddings))
    adapters = {
        name: make_kind(
            checkpoint, root / name, kind.config, seed=seed, std=0.1, vocabulary=kind.vocabulary, **kind.options
        )
        for seed, (name, kind) in enumerate(kinds.items())
    }
    adapters["plain"] = make_kind(
        checkpoint, root / "plain", peft.LoraConfig(r=4, task_type="CAUSAL_LM", **targets_of(architecture)), seed=99
    )
    vocabularies = {name: kind.vocabulary for name, kind in kinds.items()}
    rows = [(name, prompt_for(vocabularies.get(name or "", V), row)) for row, name in enumerate((None, *adapters))]
    return Case(checkpoint, adapters, vocabularies, ask_oracle(checkpoint, adapters, rows, vocabularies=vocabularies))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_a_mixed_batch_equals_peft_alone(case: Case, options: dict[str, bool]) -> None:
    assert_equal_to_peft(engine_for(case.checkpoint, case.adapters, **options), case.truths)


def test_added_tokens_are_drawn(case: Case) -> None:
    """Otherwise no row would read the embedding of one that it drew itself."""
    drawn = [token for truth in case.truths for token in truth.tokens]
    assert any(token >= V for token in drawn)


def test_the_logits_of_a_row_are_as_many_as_its_own_adapter_knows_tokens(case: Case) -> None:
    for truth in case.truths:
        assert truth.logits.shape[1] == case.vocabularies.get(truth.adapter or "", V)
    engine = engine_for(case.checkpoint, case.adapters)
    for name, digest in engine.digests.items():
        assert engine.weights[digest].spec.vocabulary == case.vocabularies.get(name, 0)


@pytest.mark.parametrize("others", [True, False], ids=["beside others", "alone"])
def test_merged_they_answer_alike(case: Case, others: bool) -> None:
    engine = engine_for(case.checkpoint, case.adapters, merged_rows=1)
    engine.merged_weights.reconcile(frozenset(engine.digests.values()))
    engine.settle_merges()
    if others:
        assert_equal_to_peft(engine, case.truths)
    else:
        for truth in case.truths:
            assert_equal_to_peft(engine, [truth])
    assert any(plan.merged for plan in engine.plans)


SAMPLED: dict[str, Callable[[], SamplingParams]] = {
    "greedy": lambda: SamplingParams(temperature=0.0, logprobs=5),
    "drawn": lambda: SamplingParams(temperature=1.0, top_p=0.9, top_k=200, seed=3, logprobs=5),
    "penalized": lambda: SamplingParams(
        temperature=0.9, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={7: 2.0}, seed=5, logprobs=3
    ),
    "prompt": lambda: SamplingParams(temperature=0.0, prompt_logprobs=3),
}


def run(engine: ModelEngine, rows: list[tuple[Truth, str]]) -> list[list[Any]]:
    """All events of each row, and the logits behind them."""
    tickets = [engine.submit(truth.adapter, truth.prompt, 6, sampling=SAMPLED[how]()) for truth, how in rows]
    engine.run()
    return [[*map(repr, engine.events[ticket, 0]), *engine.logits(ticket).tolist()] for ticket in tickets]


def test_no_bit_of_a_row_depends_on_its_mates(case: Case) -> None:
    """Tokens, draws, log-probabilities and logits of the base, of others, and of the resized ones themselves."""
    wanted = [truth for truth in case.truths if truth.adapter in (None, "plain", "whole", "tokens", "shrunk")]
    rows = [(truth, how) for truth in wanted for how in SAMPLED]
    options = {"deterministic": True, "prefix_cache": False}
    together = run(engine_for(case.checkpoint, case.adapters, **options), rows)
    for row, found in zip(rows, together, strict=True):
        assert run(engine_for(case.checkpoint, case.adapters, **options), [row]) == [found], row[0].adapter


def test_an_id_that_only_a_neighbor_knows_fails_its_own_row(case: Case) -> None:
    """The API refuses it before; were it not to, the embedding of a wider step would not notice."""
    engine = engine_for(case.checkpoint, case.adapters)
    wide = next(truth for truth in case.truths if truth.adapter == "whole")
    assert_equal_to_peft(engine, [wide])  # it is on the device from here on
    tickets = [engine.submit(wide.adapter, wide.prompt, 40), engine.submit(None, [1, 2, V + 1], 2)]
    engine.run()
    failure = engine.events[tickets[1], 0][-1].failure
    assert failure is not None
    assert engine.tokens(tickets[1]) == []
    assert engine.tokens(tickets[0])[: len(wide.tokens)] == wide.tokens

"""Several adapters with weights act as one, exactly: against the sum of what PEFT makes of each alone, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig

from loramux_adapters.combining import MOST_SUMMED, combine
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.parts.dense import Dense
from loramux_adapters.parts.low_rank import LowRank
from support.against_peft import BOUND, Truth, assert_equal_to_peft, engine_for, prompts
from support.all_kinds import CONFIGS, INVOCATION, make_all_kinds
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.combined import CombinedOracle, Terms, add_combination, concatenated
from support.kinds import KindOracle, make_kind, targets_of

PROMPT = [*prompts(1, shortest=9)[0], *INVOCATION, 5, 60, 7]


def _lora(architecture: str, **options: Any) -> PeftConfig:
    wanted = {**targets_of(architecture), **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=architecture == "gpt2", **wanted)


_BIASED = {"llama": ["q_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
MORE: dict[str, Callable[[str], PeftConfig]] = {
    "lora bias": lambda architecture: _lora(architecture, r=4, bias="all"),
    "lora bias too": lambda architecture: _lora(architecture, r=2, bias="all", target_modules="all-linear"),
    # PEFT merges no bias where the base has none.
    "lora deltas": lambda architecture: _lora(
        architecture, r=4, lora_bias=architecture != "llama", **targets_of(architecture, *_BIASED[architecture])
    ),
    "ia3 too": CONFIGS["ia3"],
    "norms too": CONFIGS["norms"],
    "alora too": CONFIGS["alora"],
    "tokens too": lambda architecture: _lora(architecture, r=4, trainable_token_indices=list(range(0, 320, 3))),
    "dora of an embedding": lambda architecture: _lora(
        architecture, r=4, use_dora=True, target_modules=["wte" if architecture == "gpt2" else "embed_tokens"]
    ),
    "lora of both ends": lambda architecture: _lora(
        architecture, r=4, target_modules=["wte" if architecture == "gpt2" else "embed_tokens", "lm_head"]
    ),
}

COMBINATIONS: dict[str, Terms] = {
    "scaled": [("lora 4", 0.5)],
    "two low ranks": [("lora 4", 0.7), ("lora 17", -0.4)],
    "low ranks of other methods": [("lora 17", 1.5), ("vera", 0.5), ("gralora", 0.7), ("loha", 1.0)],
    "invoked": [("alora", 0.8), ("alora too", 0.6)],
    "biases": [("lora bias", 0.6), ("lora bias too", 0.7), ("lora deltas", 0.5)],
    "one whole bias": [("lora bias", 1.0), ("lora 4", 0.5)],
    "gains": [("ia3", 0.5), ("ia3 too", 1.2)],
    "low rank and gains": [("lora 4", 1.0), ("ia3", 1.0)],
    "with a prefix": [("lora 4", 1.0), ("prefix", 1.0), ("ia3", 1.0)],
    "with a prompt": [("lora 17", 0.6), ("prompt", 1.0)],
    "with a cartridge and norms": [("cartridge", 1.0), ("norms", 0.5), ("dora", 1.0)],
    "magnitudes beside low ranks": [("dora", 1.0), ("lora 4", 0.6)],
    "magnitudes beside gains": [("dora", 1.0), ("ia3", 1.0)],
    "half a magnitude": [("dora", 0.5)],
    "on the input and not": [("hra", 1.0), ("lora 4", 1.0)],
    "dense": [("oft", 0.7), ("fourierft", 0.5), ("lora 4", 1.0)],
    "two norms": [("norms", 0.3), ("norms too", 0.5)],
    "a head and low ranks": [("head", 1.0), ("lora 4", 0.5)],
    "trained tokens": [("tokens", 0.6), ("tokens too", -0.3)],
    "tokens and low ranks of both ends": [("tokens", 0.5), ("lora of both ends", 0.7)],
    "with added tokens": [("added tokens", 1.0), ("lora 17", 0.6)],
    "half a head": [("head", 0.5), ("tokens", 1.0)],
}
# Their weights are sums of whole weights, as no low rank is what they come to.
DENSE = {"magnitudes beside low ranks", "magnitudes beside gains", "half a magnitude", "on the input and not", "dense"}

Case = tuple[Path, dict[str, Path], dict[str, Terms], list[Truth]]


@pytest.fixture(scope="module", params=("llama", "qwen2", "gpt2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("combined")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    adapters = make_all_kinds(checkpoint, root, architecture)
    for seed, (name, config) in enumerate(MORE.items(), 50):
        adapters[name] = make_kind(checkpoint, root / name, config(architecture), seed=seed, std=0.1)
    known = {name: terms for name, terms in COMBINATIONS.items() if all(each in adapters for each, _ in terms)}
    truths = [_oracle(checkpoint, adapters, terms, root / name).truth(name, PROMPT, 4) for name, terms in known.items()]
    alone = ["lora 4", "dora", "ia3", "norms", "lora bias"]
    truths += [CombinedOracle(checkpoint, adapters, [(name, 1.0)]).truth(name, PROMPT, 4) for name in alone]
    return checkpoint, adapters, known, [*truths, CombinedOracle(checkpoint, adapters, []).truth(None, PROMPT, 4)]


def _oracle(checkpoint: Path, adapters: dict[str, Path], terms: Terms, out: Path) -> KindOracle:
    if terms[0][0] == "alora":
        return KindOracle(checkpoint, concatenated(out, [(adapters[name], weight) for name, weight in terms]))
    return CombinedOracle(checkpoint, adapters, terms)


def test_they_act_as_their_sum_in_one_batch_with_each_alone(case: Case) -> None:
    checkpoint, adapters, combinations, truths = case
    for options in ({}, {"deterministic": True, "prefill_chunk": 16}):
        engine = engine_for(checkpoint, adapters, **options)
        for name, terms in combinations.items():
            add_combination(engine, name, terms, float_base(checkpoint).spec)
        assert_equal_to_peft(engine, truths)


def test_no_two_say_the_same(case: Case) -> None:
    _, _, _, truths = case
    for index, one in enumerate(truths):
        for other in truths[index + 1 :]:
            width = min(one.logits.shape[1], other.logits.shape[1])
            differs = (one.logits[0, :width] - other.logits[0, :width]).abs().max() / one.logits.std()
            assert float(differs) > 10 * BOUND, (one.adapter, other.adapter)


def test_ranks_add_where_all_are_low_ranks_and_weights_elsewhere(case: Case) -> None:
    checkpoint, adapters, combinations, _ = case
    spec = float_base(checkpoint).spec
    engine = engine_for(checkpoint, adapters)
    for name, terms in combinations.items():
        weights = add_combination(engine, name, terms, spec)
        dense = {module for module, each in weights.modules.items() if each.get(Dense) is not None}
        if name in DENSE:
            assert dense - {spec.head}, name
            assert not dense & weights.spec.ranks.keys()
        elif not {each for each, _ in terms} & {"head", "tokens", "added tokens"}:
            assert not dense, name
    two = engine.weights[engine.digests["two low ranks"]]
    assert set(two.spec.ranks.values()) == {4 + 17}
    for name, module in two.modules.items():
        part = module.get(LowRank)
        assert part is not None
        assert part.rank == two.spec.ranks[name]


def test_a_combination_is_its_terms_in_any_order(case: Case) -> None:
    checkpoint, adapters, _, _ = case
    spec = float_base(checkpoint).spec
    engine = engine_for(checkpoint, adapters)
    terms = [("lora 4", 0.7), ("lora 17", -0.4)]
    digests = {
        add_combination(engine, str(index), each, spec).spec.digest for index, each in enumerate([terms, terms[::-1]])
    }
    others = {
        add_combination(engine, str(index), each, spec).spec.digest
        for index, each in enumerate([[("lora 4", 0.7)], [("lora 4", -0.4), ("lora 17", 0.7)], [("lora 4", 0.71)]])
    }
    assert len(digests) == 1
    assert len(others | digests) == 4
    assert not (others | digests) & {engine.digests[name] for name in adapters}


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ([("prompt", 1.0), ("prefix", 1.0)], " stand before the prompt"),
        ([("prompt", 0.5), ("lora 4", 1.0)], "positions have no weight"),
        ([("alora", 1.0), ("lora 4", 1.0)], "acts from its invocation tokens on only"),
        ([("lora 4", 1.0), ("lora 4", 0.5)], "one and the same content"),
        ([("added tokens", 0.5)], "the base knows nothing of the tokens that "),
        ([("added tokens", 1.0), ("lora of both ends", 1.0)], "another changes rows of the base's"),
        ([("dora of an embedding", 0.5)], "Magnitude of one adapter has no exact sum"),
    ],
)
def test_what_has_no_exact_sum_is_refused(case: Case, terms: Terms, why: str) -> None:
    checkpoint, adapters, _, _ = case
    engine = engine_for(checkpoint, adapters)
    with pytest.raises(AdapterIncompatible, match=why):
        add_combination(engine, "refused", terms, float_base(checkpoint).spec)


def test_few_may_make_a_weight_anew_at_one_module(case: Case) -> None:
    """However little each costs, a step waits for all."""
    checkpoint, adapters, _, _ = case
    spec, engine = float_base(checkpoint).spec, engine_for(checkpoint, adapters)
    dora = engine.weights[engine.digests["dora"]]
    terms = [(replace(dora, spec=replace(dora.spec, digest=f"{index:064x}")), 0.1) for index in range(MOST_SUMMED + 1)]
    low_ranks = [(engine.weights[engine.digests[name]], 0.5) for name in ("lora 4", "lora 17")]
    assert combine([*terms[:-1], *low_ranks], spec).nbytes
    with pytest.raises(AdapterIncompatible, match="5 of the adapters make a weight of their own there, and 4 may"):
        combine(terms, spec)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf"), 101.0])
def test_a_weight_that_is_none_is_refused(case: Case, weight: float) -> None:
    checkpoint, adapters, _, _ = case
    engine = engine_for(checkpoint, {"lora 4": adapters["lora 4"]})
    with pytest.raises(ValueError, match="a weight must be from 1e-06 to 100"):
        add_combination(engine, "refused", [("lora 4", weight)], float_base(checkpoint).spec)

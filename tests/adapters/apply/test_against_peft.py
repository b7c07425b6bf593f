"""What an adapter may touch beyond projections: biases, norms, embeddings, the head, tied weights. PEFT is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.base.weight_formats import WeightFormats
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from support.against_peft import ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "gpt2-bias": (
        "gpt2",
        {},
        {
            "all": {"r": 4, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
            "own": {"r": 4, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
            "none": {"r": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True},
        },
    ),
    "qwen2-bias": (
        "qwen2",
        {},
        {
            "all": {"r": 4, "target_modules": ["o_proj"], "bias": "all"},
            "own": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "lora_only"},
            "one": {"r": 4, "target_modules": ["k_proj"], "bias": "lora_only", "layers_to_transform": [1]},
        },
    ),
    "llama-ends": (
        "llama",
        {},
        {
            "embedding": {"r": 5, "target_modules": ["embed_tokens"]},
            "head": {"r": 5, "target_modules": ["lm_head", "q_proj"]},
            "both": {"r": 9, "lora_alpha": 3, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head"]},
        },
    ),
    "llama-tied": (
        "llama",
        {"tie_word_embeddings": True},
        {
            "embedding": {"r": 5, "target_modules": ["embed_tokens"]},
            "head": {"r": 5, "target_modules": ["lm_head"]},
            "inner": {"r": 5, "target_modules": LLAMA},
        },
    ),
    "gemma-scaled-embedding": (
        "gemma",
        {},
        {
            "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
            "head": {"r": 4, "target_modules": ["lm_head"]},
        },
    ),
    "gemma3-scaled-embedding": ("gemma3_text", {}, {"embedding": {"r": 4, "target_modules": ["embed_tokens"]}}),
    "gpt2-ends": (
        "gpt2",
        {},
        {
            "words": {"r": 4, "target_modules": ["wte"]},
            "places": {"r": 4, "target_modules": ["wpe", "c_proj"], "fan_in_fan_out": True},
            "head": {"r": 4, "target_modules": ["lm_head"]},
        },
    ),
    "patterns": (
        "llama",
        {},
        {
            "ranks": {"r": 4, "target_modules": LLAMA, "rank_pattern": {"q_proj": 17, r".*layers\.1.*down_proj": 1}},
            "alphas": {"r": 4, "lora_alpha": 8, "target_modules": LLAMA, "alpha_pattern": {"v_proj": 32}},
            "regex": {"r": 4, "target_modules": r".*\.1\..*(k_proj|gate_proj)"},
            "excluded": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj", "k_proj"]},
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    architecture, overrides, adapters = CASES[request.param]
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture, **overrides), root / "base")
    return checkpoint, {
        name: make_adapter_for(checkpoint, root / name, seed=seed, **options)
        for seed, (name, options) in enumerate(adapters.items())
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"deterministic": True}, {"weight_formats": WeightFormats(dense=True), "stack": False}],
    ids=["plain", "deterministic", "unstacked"],
)
def test_a_mixed_batch_equals_peft_alone(case: tuple[Path, dict[str, Path]], options: dict[str, Any]) -> None:
    checkpoint, adapters = case
    names = [None, *adapters, None, *adapters]
    truths = ask_peft(checkpoint, adapters, list(zip(names, prompts(len(names)), strict=True)), count=4)
    assert_equal_to_peft(engine_for(checkpoint, adapters, **options), truths)


def test_each_of_them_changes_what_is_said(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    prompt = prompts(3)[2]
    base, *adapted = ask_peft(checkpoint, adapters, [(name, prompt) for name in (None, *adapters)], count=1)
    for truth in adapted:
        assert float((truth.logits - base.logits).abs().max() / base.logits.std()) > 0.01, truth.adapter


def test_an_adapter_leaves_nothing_when_it_goes(tmp_path: Path) -> None:
    """Biases, norms and embedding factors of a slot are gone with it, also for whoever gets the slot next."""
    checkpoint = save_checkpoint(wide_model("gpt2"), tmp_path / "base")
    adapters = {
        "first": make_adapter_for(
            checkpoint, tmp_path / "a", seed=1, r=16, target_modules=["c_attn", "wte"], bias="all"
        ),
        "next": make_adapter_for(checkpoint, tmp_path / "b", seed=2, r=16, target_modules=["c_fc"]),
    }
    rows = [("first", prompts(1)[0]), ("next", prompts(2)[1]), (None, prompts(3)[2]), ("first", prompts(4)[3])]
    truths = ask_peft(checkpoint, adapters, rows, count=3)
    engine = engine_for(checkpoint, adapters)
    for truth in truths:  # one after another: each leaves before the next comes
        assert_equal_to_peft(engine, [truth])
        for digest in engine.digests.values():
            engine.pool.discard(digest)
        engine.step()
        assert engine.pool.stats().resident == 0
        places = [at for at, _ in engine.adapted.sites.values() if at.site.kind not in ("attention", "sublayer")]
        biased = [at for at in places if at.site.kind != "embedding"]
        assert not any(any(at.of(Bias).values) for at in biased)
        assert not any(at.of(LowRank).slots for at in places if at.site.kind == "embedding")


def test_a_base_bias_of_zero_is_still_a_bias(tmp_path: Path) -> None:
    model = wide_model("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    checkpoint = save_checkpoint(model, tmp_path / "base")
    adapter = make_adapter_for(checkpoint, tmp_path / "a", seed=1, r=4, target_modules=["q_proj"], bias="all")
    truths = ask_peft(checkpoint, {"a": adapter}, [("a", prompts(1)[0]), (None, prompts(1)[0])], count=3)
    assert_equal_to_peft(engine_for(checkpoint, {"a": adapter}), truths)

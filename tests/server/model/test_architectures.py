"""Every architecture we name serves a mixed batch of base and adapters as PEFT serves each alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.against_peft import Truth, ask_peft, assert_equal_to_peft, engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model

LLAMA_LIKE = {"attention": ["q_proj", "v_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, list[str]]]] = {
    "llama": ("llama", {}, LLAMA_LIKE),
    "llama, tied, multi-query": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, LLAMA_LIKE),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        LLAMA_LIKE,
    ),
    "mistral, window 12": ("mistral", {"sliding_window": 12}, LLAMA_LIKE),
    "qwen2": ("qwen2", {}, LLAMA_LIKE),
    "qwen3": ("qwen3", {}, LLAMA_LIKE),
    "gemma": ("gemma", {}, LLAMA_LIKE),
    "gemma2": ("gemma2", LAYERS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}, LLAMA_LIKE),
    "gemma3_text": ("gemma3_text", LAYERS, LLAMA_LIKE),
    "gpt2": ("gpt2", {}, {"attention": ["c_attn"], "mlp": ["c_fc", "c_proj"]}),
    "gpt2, inverse layer scale": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        {"attention": ["c_attn"], "mlp": ["c_fc"]},
    ),
    "phi3": ("phi3", {}, {"attention": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]}),
}  # fmt: skip
ORDER = ["attention", None, "every", "mlp", None, "attention", "every"]


@dataclass(frozen=True)
class ArchitectureHarness:
    checkpoint: Path
    adapters: dict[str, Path]
    truths: list[Truth]


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ArchitectureHarness:
    architecture, overrides, targets = MODELS[request.param]
    root = tmp_path_factory.mktemp("architecture")
    checkpoint = save_checkpoint(wide_model(architecture, **overrides), root / "base")
    more: dict[str, Any] = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    options: dict[str, dict[str, Any]] = {
        "attention": {"r": 8, "lora_alpha": 16, "target_modules": targets["attention"]},
        "mlp": {"r": 3, "lora_alpha": 3, "target_modules": targets["mlp"], "use_rslora": True},
        "every": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
    }
    adapters = {
        name: make_adapter_for(checkpoint, root / name, seed=seed, **chosen, **more)
        for seed, (name, chosen) in enumerate(options.items())
    }
    truths = ask_peft(checkpoint, adapters, list(zip(ORDER, prompts(len(ORDER)), strict=True)))
    return ArchitectureHarness(checkpoint, adapters, truths)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 24, "max_running": 8}, {"deterministic": True, "prefill_chunk": 16}],
    ids=["whole", "chunked", "deterministic"],
)
def test_a_mixed_batch_equals_peft_alone(harness: ArchitectureHarness, options: dict[str, Any]) -> None:
    assert_equal_to_peft(engine_for(harness.checkpoint, harness.adapters, **options), harness.truths)


def test_adapters_differ(harness: ArchitectureHarness) -> None:
    """Otherwise the comparison would show nothing."""
    prompt = harness.truths[2].prompt
    rows = [(name, prompt) for name in (None, *harness.adapters)]
    first = [truth.logits[0] for truth in ask_peft(harness.checkpoint, harness.adapters, rows, count=1)]
    for index, logits in enumerate(first):
        for other in first[:index]:
            assert float((logits - other).abs().max() / logits.std()) > 0.05

"""LoRA's variants (DoRA, a bias on lora_B) in one mixed batch: PEFT alone, on the dequantized base, is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from support.against_peft import assert_equal_to_peft, engine_for, prompts
from support.checkpoints import save_checkpoint, wide_model
from support.kinds import ask_oracle, make_kind, targets_of

ARCHITECTURES = ("llama", "qwen2", "gpt2")


def lora(architecture: str, **options: object) -> LoraConfig:
    fan = architecture == "gpt2"
    return LoraConfig(
        **{"r": 4, "task_type": "CAUSAL_LM", "fan_in_fan_out": fan, **targets_of(architecture), **options}
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    architecture: str = request.param
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(architecture), root / "base")
    embedding = "wte" if architecture == "gpt2" else "embed_tokens"
    configs = {
        "plain": lora(architecture),
        "dora": lora(architecture, use_dora=True),
        "dora-rs": lora(architecture, use_dora=True, r=9, use_rslora=True),
        "dora-embedding": lora(architecture, use_dora=True, target_modules=[embedding]),
    }
    if architecture in ("qwen2", "gpt2"):
        biased = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
        configs["lora-bias"] = lora(architecture, lora_bias=True, target_modules=biased)
        configs["dora-bias"] = lora(architecture, use_dora=True, bias="lora_only", target_modules=biased)
    return checkpoint, {
        name: make_kind(checkpoint, root / name, config, seed=seed)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_a_mixed_batch_equals_peft_alone(case: tuple[Path, dict[str, Path]], options: dict[str, bool]) -> None:
    checkpoint, adapters = case
    names = [None, *adapters, *adapters]
    truths = ask_oracle(checkpoint, adapters, list(zip(names, prompts(len(names)), strict=True)))
    assert_equal_to_peft(engine_for(checkpoint, adapters, **options), truths)

"""One adapter of every kind of part, and some of several: what mixed batches are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
from peft import PeftConfig

from support.kinds import make_kind, targets_of

INVOCATION = [7, 11]


def _of(config: Callable[..., PeftConfig], **options: object) -> Callable[[str], PeftConfig]:
    return lambda architecture: config(**{"task_type": "CAUSAL_LM", **targets_of(architecture), **options})


def _lora(architecture: str, **options: object) -> PeftConfig:
    return _of(peft.LoraConfig, fan_in_fan_out=architecture == "gpt2", **options)(architecture)


def _ia3(architecture: str) -> PeftConfig:
    return _of(peft.IA3Config, feedforward_modules=["c_fc" if architecture == "gpt2" else "down_proj"])(architecture)


def _norms(architecture: str) -> PeftConfig:
    name = "ln_1" if architecture == "gpt2" else "input_layernorm"
    return peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=[name])


def _embedding(architecture: str) -> str:
    return "wte" if architecture == "gpt2" else "embed_tokens"


def _before(config: Callable[..., PeftConfig], count: int) -> Callable[[str], PeftConfig]:
    return lambda _architecture: config(task_type="CAUSAL_LM", num_virtual_tokens=count)


CONFIGS: dict[str, Callable[[str], PeftConfig]] = {
    "lora 4": lambda architecture: _lora(architecture, r=4),
    "lora 17": lambda architecture: _lora(architecture, r=17),
    "dora": lambda architecture: _lora(architecture, r=4, use_dora=True),
    "alora": lambda architecture: _lora(architecture, r=4, alora_invocation_tokens=INVOCATION),
    "head": lambda architecture: _lora(architecture, r=4, modules_to_save=["lm_head"]),
    "tokens": lambda architecture: _lora(architecture, r=4, trainable_token_indices=list(range(0, 320, 2))),
    "added tokens": lambda architecture: _lora(
        architecture, r=4, modules_to_save=[_embedding(architecture), "lm_head"]
    ),
    "vera": _of(peft.VeraConfig, r=24),
    "gralora": _of(peft.GraloraConfig, r=8),
    "ia3": _ia3,
    "loha": _of(peft.LoHaConfig, r=4),
    "hra": _of(peft.HRAConfig, r=6),
    "oft": _of(peft.OFTConfig, oft_block_size=32),
    "fourierft": _of(peft.FourierFTConfig, n_frequency=100),
    "norms": _norms,
    "prompt": _before(peft.PromptTuningConfig, 7),
    "prefix": _before(peft.PrefixTuningConfig, 19),
    "cartridge": _before(peft.CartridgeConfig, 5),
}
VOCABULARIES = {"added tokens": 323}
"""What the base is resized to before an adapter of a kind is made; the others leave it alone."""

# What PEFT has no layer for on GPT-2's Conv1D.
_LINEAR_ONLY = {"loha", "hra", "oft"}


def make_all_kinds(checkpoint: Path, root: Path, architecture: str) -> dict[str, Path]:
    """PEFT directories by kind."""
    return {
        kind: make_kind(
            checkpoint, root / kind, config(architecture), seed=seed, std=0.1, vocabulary=VOCABULARIES.get(kind)
        )
        for seed, (kind, config) in enumerate(CONFIGS.items())
        if architecture != "gpt2" or kind not in _LINEAR_ONLY
    }

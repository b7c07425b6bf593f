"""Small random checkpoints on disk that are loaded as any model is, and their PEFT twins in NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from loramux_adapters.base.load import LoadedBase, load_base
from support.adapters import peft_warnings_ignored, randomize, save, tiny_model, wrap

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 256}
WIDE_GPT2 = {"n_embd": 128, "n_head": 4, "vocab_size": 320, "n_positions": 256}
"""Two blocks and more per row, so that quantization and stacking show their faults; k and v are 64 wide."""


def wide_model(architecture: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model wide enough to be quantized in several blocks, its logits spread enough to have clear maxima."""
    sizes = WIDE_GPT2 if architecture == "gpt2" else WIDE
    model = tiny_model(architecture, seed=seed, **(sizes | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def save_checkpoint(model: PreTrainedModel, directory: Path) -> Path:
    """A Hugging Face directory."""
    model.save_pretrained(str(directory))
    return directory


def float_base(directory: Path) -> LoadedBase:
    """The checkpoint in NF4 with float32 compute."""
    return load_base(directory, compute_dtype=torch.float32)


def make_adapter_for(directory: Path, out: Path, *, seed: int, std: float = 0.05, **options: Any) -> Path:
    """A PEFT directory made by PEFT itself on the checkpoint, every tensor random."""
    from transformers import AutoModelForCausalLM

    wrapped = wrap(AutoModelForCausalLM.from_pretrained(str(directory)), seed=seed, **options)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(std / 0.2)
    return save(wrapped, out)


class PeftOracle:
    """PEFT alone, one adapter at a time, on the same NF4 base in float32: recomputes the whole sequence per token."""

    def __init__(self, checkpoint: Path, adapter: Path | None) -> None:
        base = float_base(checkpoint)
        self.model: Any = base.model
        if adapter is not None:
            with peft_warnings_ignored():
                self.model = PeftModel.from_pretrained(base.model, str(adapter)).eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab] float32."""
        out: torch.Tensor = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return out.float()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """`count` greedy tokens after the prompt."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


__all__ = [
    "WIDE", "PeftOracle", "float_base", "make_adapter_for", "randomize", "save_checkpoint", "wide_model",
]  # fmt: skip

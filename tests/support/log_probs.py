"""Log-probabilities of rows by plain forward passes, one row at a time: what a loss is handed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loramux_trainer.data.examples import IGNORE, Example


def log_probs(model: Any, rows: Sequence[Example]) -> list[Tensor]:
    """For each row those of its supervised tokens."""
    results = []
    for row in rows:
        predicted = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row.labels[1:])
        at = (labels != IGNORE).nonzero().squeeze(1)
        results.append(predicted[at, labels[at]])
    return results


def small_llama(vocabulary: int, seed: int) -> Any:
    """A random model of two layers in float32. Logits are far enough from uniform to tell losses apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config)

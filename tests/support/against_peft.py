"""One mixed batch against PEFT alone, adapter by adapter, on the same NF4 base in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.checkpoints import PeftOracle, float_base
from support.model_engine import ModelEngine

BOUND = 1e-4
"""Largest logit difference over the logits' standard deviation; measured 1e-5. A wrong scale gives 1e-1."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What PEFT alone says for one row of a batch."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor  # [tokens, vocab]: what predicted them


def ask_peft(
    checkpoint: Path, adapters: dict[str, Path], rows: Sequence[tuple[str | None, list[int]]], count: int = 5
) -> list[Truth]:
    """`count` greedy tokens for each (adapter, prompt)."""
    found: dict[int, Truth] = {}
    for name in {name for name, _ in rows}:
        oracle = PeftOracle(checkpoint, None if name is None else adapters[name])
        for index, (wanted, prompt) in enumerate(rows):
            if wanted == name:
                tokens = oracle.greedy(prompt, count)
                logits = oracle.logits(prompt + tokens)[len(prompt) - 1 : -1]
                found[index] = Truth(name, prompt, tokens, logits)
    return [found[index] for index in range(len(rows))]


@torch.inference_mode()
def ask_model(model: Any, prompt: list[int], count: int = 3) -> Truth:
    """The bare model alone: one sequence, no cache, its own eager attention."""
    model.set_attn_implementation("eager")
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return Truth(None, prompt, tokens[len(prompt) :], logits)


def assert_equal_to_peft(engine: ModelEngine, truths: Sequence[Truth]) -> None:
    """All rows at once: the same tokens, and logits within BOUND."""
    tickets = [engine.submit(truth.adapter, truth.prompt, len(truth.tokens)) for truth in truths]
    engine.run()
    for ticket, truth in zip(tickets, truths, strict=True):
        logits = engine.logits(ticket)[: len(truth.tokens)]
        assert engine.tokens(ticket) == truth.tokens, truth.adapter
        error = (logits - truth.logits).abs().max() / truth.logits.std()
        assert float(error) < BOUND, (truth.adapter, float(error))


def engine_for(checkpoint: Path, adapters: dict[str, Path], **options: Any) -> ModelEngine:
    """A fresh engine in float32."""
    return ModelEngine(float_base(checkpoint), adapters, **options)


def prompts(count: int, *, shortest: int = 5, step: int = 7, vocabulary: int = 320) -> list[list[int]]:
    """Prompts that differ from their first token on, of growing length."""
    return [
        [(row * 37 + place * (row + 3)) % vocabulary for place in range(shortest + row * step)] for row in range(count)
    ]

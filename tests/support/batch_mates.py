"""Whether a request's logits are the same bits alone and among any batch mates; also for processes of more threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.base.load import load_base
from loramux_adapters.base.weight_formats import WeightFormats, supports_packed
from loramux_server.requests import SamplingParams
from support.against_peft import prompts
from support.model_engine import ModelEngine

EXACT: dict[str, Any] = {"deterministic": True, "prefill_chunk": 16}
BATCHES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_batch_tokens": 32, "max_running": 12},
    "preempted": {"kv_blocks": 110, "block_tokens": 2, "max_batch_tokens": 64, "max_running": 16},
}
COUNT = 8


def check_exact(checkpoint: Path, adapters: dict[str, Path], dtype: torch.dtype, batch: str) -> dict[str, int]:
    """Twelve requests together, then the same again over a warm prefix cache, against each alone on a cold one."""

    def fresh(**options: Any) -> ModelEngine:
        base = load_base(checkpoint, compute_dtype=dtype)
        return ModelEngine(base, adapters, weight_formats=WeightFormats(packed=supports_packed()), **(EXACT | options))

    names = [None, *adapters] * 4
    rows = [
        (name, prompt, SamplingParams(temperature=0.0 if index % 3 else 0.8, seed=index))
        for index, (name, prompt) in enumerate(zip(names[:12], prompts(12), strict=True))
    ]
    together = fresh(**BATCHES[batch])
    rounds = []
    for _ in range(2):
        rounds.append([together.submit(name, prompt, COUNT, sampling=params) for name, prompt, params in rows])
        together.run()
    alone = fresh(prefix_cache=False)
    for index, (name, prompt, params) in enumerate(rows):
        own = alone.submit(name, prompt, COUNT, sampling=params)
        alone.run()
        for tickets in rounds:
            assert together.tokens(tickets[index]) == alone.tokens(own), (batch, index)
            assert torch.equal(together.logits(tickets[index]), alone.logits(own)), (batch, index)
    usages = [together.events[ticket, 0][-1].usage for ticket in rounds[1]]
    return {
        "preemptions": together.scheduler.take_counters().preemptions,
        "cached": sum(usage.cached for usage in usages if usage),
    }


def main() -> None:
    """`checkpoint name=adapter ...`: in chunks, in both dtypes."""
    checkpoint, *adapters = sys.argv[1:]
    named = {name: Path(path) for name, _, path in (each.partition("=") for each in adapters)}
    for dtype in (torch.float32, torch.bfloat16):
        check_exact(Path(checkpoint), named, dtype, "chunked")

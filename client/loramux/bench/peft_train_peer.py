"""The peer of training: PEFT on the same NF4 checkpoint, one step of one adapter after another.

Run as a module; see `peer`. As its users do it: `get_peft_model`, AdamW fused, gradients clipped to a norm of 1.
Imports nothing of Loramux that computes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from loramux.bench.peer import Answer, answer_lines
from loramux.bench.peft_peer import load


class PeftTrainPeer:
    """One adapter: what another one's step costs is the same."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.manual_seed(setup["seed"])
        base = load({"model": setup["model"], "adapters": (), "dtype": "float32"})
        rank = setup["rank"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model: Any = get_peft_model(base, config)
        self._model.train()
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=setup["rate"], weight_decay=0.0, fused=True)
        self._rows, self._vocabulary = setup["rows"], self._model.config.vocab_size

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """As many steps as there are members."""
        torch.set_num_threads(message["threads"])
        count = message["members"]
        ids = torch.randint(3, self._vocabulary, (count, self._rows, message["tokens"]))
        wall, processor = time.perf_counter(), time.process_time()
        for own in ids:
            loss = self._model(input_ids=own, labels=own, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            loss.item()
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        return {"stepped": count, "wall_seconds": wall, "processor_seconds": processor}


def _make(setup: dict[str, Any]) -> Answer:
    return PeftTrainPeer(setup).answer


if __name__ == "__main__":
    answer_lines(_make)

"""The peer itself: PEFT on the same NF4 checkpoint, `generate(adapter_names=[...])` over one static batch.

Run as a module; see `peer`. Each question is one batch. Imports nothing of Loramux that computes.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria, StoppingCriteriaList

from loramux.bench.peer import Answer, answer_lines

BASE = "__base__"  # PEFT's own word for a row without an adapter


class _Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Notes the time after every token; never stops anything."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.arrivals: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.arrivals.append(time.perf_counter() - self.started)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load(setup: dict[str, Any]) -> Any:
    """The NF4 base with every adapter of the set-up line; adapter i is named `a<i>`."""
    dtype = getattr(torch, setup["dtype"])
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        setup["model"], quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    for number, path in enumerate(setup["adapters"]):
        if number == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="a0")
        else:
            model.load_adapter(path, adapter_name=f"a{number}")
    return model.eval()


@torch.inference_mode()
def run(model: Any, batch: dict[str, Any]) -> list[float]:
    """Generate exactly `output_tokens` per row; seconds from the call to each token."""
    ids = torch.tensor(batch["prompts"], device=model.device)  # [rows, prompt]
    length = batch["output_tokens"]
    clock = _Clock()
    options: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "min_new_tokens": length,
        "max_new_tokens": length,
        "stopping_criteria": StoppingCriteriaList([clock]),
    }
    names = [BASE if number is None else f"a{number}" for number in batch["adapters"]]
    if set(names) == {BASE} and isinstance(model, PeftModel):
        with model.disable_adapter():
            model.generate(**options)
    elif set(names) == {BASE}:
        model.generate(**options)
    else:
        model.generate(**options, adapter_names=names)
    return clock.arrivals


def _make(setup: dict[str, Any]) -> Answer:
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = load(setup)
    return lambda batch: {"arrivals": run(model, batch)}


if __name__ == "__main__":
    answer_lines(_make)

"""AdapterHub's own package as the oracle. A program for an environment of its own, in which nothing of ours is.

    python3 -m venv /tmp/adapterhub && /tmp/adapterhub/bin/pip install adapters==1.3.0 torch safetensors

Makes adapters on a float32 checkpoint, saves them, and prints what greedy decoding with each of them says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import adapters  # type: ignore[import-not-found]
from adapters import BnConfig

NAME = "task"


def make(model: Any, options: dict[str, Any], seed: int, out: Path) -> None:
    """One adapter, every tensor moved by noise."""
    torch.manual_seed(seed)
    # Of training alone, and it wants torchvision.
    model.add_adapter(NAME, config=BnConfig(**{**options, "stochastic_depth": 0.0}))
    model.set_active_adapters(NAME)
    with torch.no_grad():
        own = {name: each for name, each in model.named_parameters() if f".adapters.{NAME}." in name}
        for parameter in own.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    try:
        model.save_adapter(str(out), NAME, with_head=False, use_safetensors=True)
    except RuntimeError:  # it cannot save a norm before the adapter, which has two names
        tensors = {name: each.clone() for name, each in model.state_dict().items() if f".adapters.{NAME}." in name}
        save_file(tensors, out / "adapter.safetensors")


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """`count` tokens after the prompt, and the logits [count, vocab] that predicted them."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return tokens[len(prompt) :], logits.float().clone()


def main(job: Path) -> None:
    """`job`: {"checkpoint", "out", "count", "rows": {name: {"options", "prompt"}}}."""
    what = json.loads(job.read_text())
    out = Path(what["out"])
    said, logits = {}, {}
    for seed, (name, row) in enumerate(what["rows"].items()):
        model = AutoModelForCausalLM.from_pretrained(what["checkpoint"], torch_dtype=torch.float32).eval()
        adapters.init(model)
        make(model, row["options"], seed, out / name)
        said[name], logits[name] = greedy(model.eval(), row["prompt"], what["count"])
    save_file(logits, out / "logits.safetensors")
    (out / "tokens.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

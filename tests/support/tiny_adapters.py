"""LoRA directories for loramux-tiny by the hundred: as PEFT would write them, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from loramux_adapters.embedded.tiny import tiny_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tiny_shapes() -> dict[str, tuple[str, int, int]]:
    """Suffix -> (parent, in_features, out_features) of a layer's linear maps."""
    config = json.loads((tiny_path() / "config.json").read_text())
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": ("self_attn", width, queries),
        "k_proj": ("self_attn", width, keys),
        "v_proj": ("self_attn", width, keys),
        "o_proj": ("self_attn", queries, width),
        "gate_proj": ("mlp", width, inner),
        "up_proj": ("mlp", width, inner),
        "down_proj": ("mlp", inner, width),
    }


def tiny_tensors(seed: int, rank: int, targets: Iterable[str], layers: Iterable[int]) -> dict[str, torch.Tensor]:
    """A and B of every module, drawn so strongly that greedy text differs from the base's."""
    generator, shapes = torch.Generator().manual_seed(seed), tiny_shapes()
    tensors = {}
    for layer in layers:
        for target in targets:
            parent, inner, outer = shapes[target]
            module = f"base_model.model.model.layers.{layer}.{parent}.{target}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * 0.3
            tensors[f"{module}.lora_B.weight"] = torch.randn(outer, rank, generator=generator) * 0.3
    return tensors


def tiny_files(
    seed: int, *, rank: int = 4, targets: tuple[str, ...] = ("q_proj",), layers: tuple[int, ...] = (0, 1, 2, 3)
) -> dict[str, bytes]:
    """An adapter's two files."""
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": list(targets),
        "layers_to_transform": list(layers),
    }  # fmt: skip
    weights = save(tiny_tensors(seed, rank, targets, layers), metadata={"format": "pt"})
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: weights}


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    """`files` in `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory

"""Bases of real sizes without a weight, and files of any size without a byte: for what reading is said to take."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.tensors import PREFIX
from loramux_adapters.formats.peft.tuner import Shape, Target, Targets, Tuner
from loramux_adapters.formats.peft.work import Work
from loramux_adapters.formats.registry import PEFT_METHODS
from loramux_adapters.spec import BaseModelSpec, ModuleSpec
from support.adapters import CONFIG, WEIGHTS

TUNERS = {tuner.peft_type: tuner for tuner in PEFT_METHODS}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers: int, hidden: int, inner: int, keys: int, vocabulary: int) -> BaseModelSpec:
    """A base of these sizes."""
    modules = [ModuleSpec("model.embed_tokens", "embedding", vocabulary, hidden, False)]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, wide, out in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", hidden, keys),
            ("self_attn.v_proj", hidden, keys), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner), ("mlp.up_proj", hidden, inner), ("mlp.down_proj", inner, hidden),
        ):  # fmt: skip
            modules.append(ModuleSpec(f"{prefix}.{name}", "linear", wide, out, False))
        modules.append(ModuleSpec(f"{prefix}.input_layernorm", "norm", hidden, hidden, False))
    modules.append(ModuleSpec("lm_head", "linear", hidden, vocabulary, False))
    return BaseModelSpec(
        model_id="llama",
        architecture="llama",
        fingerprint="f" * 64,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        context_length=4096,
        tied_embeddings=False,
        embedding="model.embed_tokens",
        head="lm_head",
        modules={module.name: module for module in modules},
        parameters={},
        kv_heads=keys // 64,
        kv_width=64,
    )


SMALL = llama(12, 768, 3072, 768, 32_000)
"""125M."""
LARGE = llama(32, 4096, 14_336, 1024, 128_256)
"""8B."""


def parsed(config: Mapping[str, Any], base: BaseModelSpec, limits: ReadLimits) -> tuple[Tuner, Targets]:
    """What a config asks for."""
    tuner = TUNERS[config["peft_type"]].parse(config)
    return tuner, tuner.resolve(base, limits)


def shapes_of(target: Target, rank: int) -> dict[str, Shape]:
    """Those of a module's tensors in a file, of rank `rank` where the file alone says it."""
    free = {"a": (rank, 1)} if not target.shapes({}).get("a", (1,))[0] else {}
    return dict(target.shapes(free))


def works_of(targets: Targets, rank: int) -> dict[str, Work]:
    """By module."""
    return {name: target.work(shapes_of(target, rank)) for name, target in targets.modules.items()}


def write_sparse(directory: Path, config: Mapping[str, Any], base: BaseModelSpec, limits: ReadLimits) -> Path:
    """An adapter of the largest rank whose numbers are all 0, and that takes no space on the disk."""
    tuner, targets = parsed(config, base, limits)
    tensors = {
        (targets.shared_names | tuner.shared_names)[role]: (role, shape) for role, shape in targets.shared.items()
    }
    for name, target in targets.modules.items():
        suffixes = target.own_suffixes or tuner.suffixes(base.modules[name].kind) if name in base.modules else {}
        for role, shape in shapes_of(target, limits.max_rank).items():
            tensors[f"{PREFIX}{name}{suffixes[role]}"] = (role, shape)
    header, end = {}, 0
    for name, (role, shape) in tensors.items():
        dtype, size = ("I32", 4) if role in tuner.index_roles else ("F16", 2)
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(config))
    with (directory / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return directory

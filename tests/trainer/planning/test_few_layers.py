"""A base with its first layers: the same weights, of fewer layers, and nothing copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from loramux_adapters.base.load import load_base, quantized_modules
from loramux_trainer.planning.few_layers import layer_counts, write_few_layers
from support.checkpoints import save_checkpoint, wide_model

COUNT = {"gpt2": "n_layer"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_the_first_layers_are_those_of_the_whole(architecture: str, tmp_path: Path) -> None:
    base = save_checkpoint(
        wide_model(architecture, **{COUNT.get(architecture, "num_hidden_layers"): 3}), tmp_path / "base"
    )
    few = write_few_layers(base, tmp_path / "few", 1)
    assert AutoConfig.from_pretrained(few).num_hidden_layers == 1
    whole, part = (load_base(path, compute_dtype=torch.float32) for path in (base, few))
    held = dict(quantized_modules(whole.model))
    found = dict(quantized_modules(part.model))
    assert found
    assert 3 * len(found) == len(held)
    for name, module in found.items():
        assert torch.equal(module.codes, held[name].codes), name
    assert not any(path.is_file() and not path.is_symlink() for path in few.iterdir() if path.name != "config.json")


def _config(path: Path, **values: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "hidden_size": 64, **values}))
    return path


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["full_attention"] * 12, (12, (1, 5))),
        (["full_attention"] * 5, (5, (5,))),
        (["sliding_attention", "full_attention"] * 6, (12, (2, 6))),
        ((["sliding_attention"] * 5 + ["full_attention"]) * 4, (24, (6, 12))),
        ((["sliding_attention"] * 5 + ["full_attention"]) * 2, (12, (12,))),
        (["sliding_attention"] * 11 + ["full_attention"], (12, (12,))),
    ],
)
def test_whole_turns_of_layers_are_measured(kinds: list[str], expected: object, tmp_path: Path) -> None:
    base = _config(tmp_path / "base", num_hidden_layers=len(kinds), layer_types=kinds)
    assert layer_counts(base) == expected

"""A merged adapter is what PEFT's own merge gives on the dequantized base, per kind of adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramux_adapters.apply.batch import MergedWeights
from loramux_adapters.apply.inject import AdaptedModel, inject
from loramux_adapters.apply.merge import merge, merged_bytes
from loramux_adapters.base.load import load_base
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from support.adapters import files_of, load_in_peft
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 24},
            "alpha_pattern": {"q_proj": 1},
            "layers_to_transform": [1],
        },
    ),
    "bias": ("qwen2", {"r": 4, "target_modules": ["k_proj", "o_proj"], "bias": "all"}),
    "bias of conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head"]}),
}


def dense_twin(checkpoint: Path, adapted: AdaptedModel) -> PreTrainedModel:
    """The plain model with every NF4 weight replaced by what its codes stand for."""
    twin = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    with torch.no_grad():
        for name, (group, member) in adapted.linears.items():
            begin, end = group.columns[member]
            weight = group.frozen.dequantize(torch.float32)[begin:end]
            site = twin.get_submodule(name)
            site.weight.copy_(weight.T if isinstance(site, Conv1D) else weight)
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_merged_weight(kind: str, tmp_path: Path) -> None:
    architecture, options = KINDS[kind]
    checkpoint = save_checkpoint(wide_model(architecture), tmp_path / "base")
    path = make_adapter_for(checkpoint, tmp_path / "a", seed=1, **options)
    base = load_base(checkpoint, compute_dtype=torch.float32)
    weights = read(files_of(path), base.spec, ReadLimits())
    adapted = inject(base, capacity=8)
    merged = load_in_peft(dense_twin(checkpoint, adapted), path).merge_and_unload()
    dense = merge(adapted, weights)
    assert dense.digest == weights.spec.digest
    touched = {name for name in weights.modules if name in adapted.linears}
    assert {adapted.linears[name][0].key for name in touched} == set(dense.weights)
    for name, (group, member) in adapted.linears.items():
        if group.key not in dense.weights:
            continue
        begin, end = group.columns[member]
        weight, bias = dense.weights[group.key].weight, dense.weights[group.key].bias
        site = merged.get_submodule(name)
        expected = site.weight.T if isinstance(site, Conv1D) else site.weight
        torch.testing.assert_close(weight[begin:end], expected.detach(), atol=1e-5, rtol=1e-5)
        if getattr(site, "bias", None) is not None:
            assert bias is not None
            torch.testing.assert_close(bias[begin:end], site.bias.detach())
    assert adapted.refingerprint() == base.spec.fingerprint


def test_bytes_are_told_before(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(wide_model("llama"), tmp_path / "base")
    path = make_adapter_for(checkpoint, tmp_path / "a", seed=1, r=4, target_modules=["q_proj", "down_proj"])
    for dtype in (torch.float32, torch.bfloat16):
        base = load_base(checkpoint, compute_dtype=dtype)
        weights = read(files_of(path), base.spec, ReadLimits())
        adapted = inject(base, capacity=8)
        dense = merge(adapted, weights)
        assert {linear.weight.dtype for linear in dense.weights.values()} == {dtype}
        assert merged_bytes(adapted, weights) == _nbytes(dense)
        assert len(dense.weights) == 4  # qkv and down, of two layers


def _nbytes(dense: MergedWeights) -> int:
    return sum(linear.weight.numel() * linear.weight.element_size() for linear in dense.weights.values())

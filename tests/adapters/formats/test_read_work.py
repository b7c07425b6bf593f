"""What a file may make the server compute: stated from shapes alone, true, and bounded for every method."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch.utils.flop_counter import FlopCounterMode

from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.work import check_work
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.dense import Dense
from support.adapters import files_of, spec_of, tiny_model
from support.module_kinds import KINDS
from support.read_work import LARGE, LINEAR, SMALL, TUNERS, parsed, shapes_of, works_of, write_sparse

LIMITS = ReadLimits()
RANK = 512
SECONDS = 0.05
KV_SIZES = {"num_layers": 12, "num_attention_heads": 12, "token_dim": 768}

# What hurts most within what each method's own keys and the size of a file allow, against 125M, and whether it is more
# than a file may take.
WORST: dict[str, tuple[dict[str, Any], bool]] = {
    "LORA": ({"r": RANK}, False),
    "ADALORA": ({"init_r": RANK, "r": RANK}, False),
    "VERA": ({"r": RANK}, False),
    "PVERA": ({"r": RANK}, False),
    "LOHA": ({"r": 30_000, "target_modules": ["down_proj"], "layers_to_transform": [0]}, True),
    "LOKR": ({"r": 1535, "decompose_factor": 1}, False),
    "GRALORA": ({"r": 32, "gralora_k": 16}, False),
    "MISS": ({"r": 768, "init_weights": "bat"}, False),
    "HRA": ({"r": RANK, "apply_GS": True}, True),
    "IA3": ({"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}, False),
    "LN_TUNING": ({"target_modules": ["input_layernorm"]}, False),
    "TRAINABLE_TOKENS": ({"target_modules": ["embed_tokens"], "token_indices": list(range(1024))}, False),
    "PROMPT_TUNING": ({"num_virtual_tokens": 4095}, False),
    "P_TUNING": ({"num_virtual_tokens": 4095}, False),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 4095, "num_ranks": RANK}, False),
    "PREFIX_TUNING": ({"num_virtual_tokens": 4095, **KV_SIZES}, False),
    "CARTRIDGE": ({"num_virtual_tokens": 4095, **KV_SIZES}, False),
    "OFT": ({"oft_block_size": 1536, "r": 0, "num_cayley_neumann_terms": 64, "peft_version": "0.18.0"}, True),
    "BOFT": (
        {"boft_block_size": 1536, "boft_n_butterfly_factor": 2, "target_modules": ["down_proj"]}, True,
    ),
    "ROAD": ({"variant": "road_4"}, False),
    "FOURIERFT": ({"n_frequency": 500_000}, True),
    "RANDLORA": ({"r": 1}, False),
    "SHIRA": ({"r": 380}, False),
    "C3A": ({"block_size": 1}, False),
    "WAVEFT": ({"n_frequency": 500_000, "wavelet_family": "db10"}, True),
    "HIRA": ({}, False),
    "VBLORA": ({"r": RANK, "vector_length": 768, "num_vectors": 2048, "topk": 2048}, True),
    "DELORA": ({"r": RANK}, False),
    "DEFT": ({"r": RANK, "decomposition_method": "qr"}, False),
    "UNILORA": ({"r": RANK, "save_indices": True, "theta_d_length": 1 << 24}, False),
    "TINYLORA": ({"r": RANK, "u": 1}, False),
    "GLORA": ({"r": RANK, "target_modules": LINEAR}, False),
    "BEFT": ({"target_modules": LINEAR}, False),
    "SUPERTUNING": ({"sparsity": 0.0, "target_modules": LINEAR}, False),
}  # fmt: skip
_UNTARGETED = {"PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"}


def worst(method: str) -> dict[str, Any]:
    targets = {} if method in _UNTARGETED else {"target_modules": LINEAR}
    return {"peft_type": method, **targets, **WORST[method][0]}


def test_every_method_has_its_worst_file() -> None:
    assert WORST.keys() == TUNERS.keys()


@pytest.mark.parametrize("method", [method for method, (_, is_refused) in WORST.items() if is_refused])
def test_a_file_that_would_take_too_long_is_refused_before_any_of_it_is_read(tmp_path: Path, method: str) -> None:
    directory = write_sparse(tmp_path / "adapter", worst(method), SMALL, LIMITS)
    spent = []
    for _ in range(3):
        begun = time.process_time()
        with pytest.raises(AdapterIncompatible, match=r"multiply-adds to|bytes of memory to") as refusal:
            read(files_of(directory), SMALL, LIMITS)
        spent.append(time.process_time() - begun)
    assert min(spent) < SECONDS
    assert "base_model.model.model.layers." in refusal.value.subject
    assert "fewer modules" in refusal.value.remedy


@pytest.mark.parametrize("method", [method for method, (_, is_refused) in WORST.items() if not is_refused])
def test_no_other_file_can_take_more_than_is_allowed(method: str) -> None:
    tuner, targets = parsed(worst(method), SMALL, LIMITS)
    works = works_of(targets, RANK)
    check_work(works, {}, SMALL.modules, LIMITS, tuner.smaller)
    assert sum(work.reading for work in works.values()) <= LIMITS.max_multiply_adds


@pytest.mark.parametrize("method", TUNERS)
def test_pefts_defaults_on_8b_are_taken(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": LINEAR}
    if method in _UNTARGETED:
        options = {"num_virtual_tokens": 100, "num_layers": 32, "num_attention_heads": 16, "token_dim": 1024}
    options |= {
        "ADALORA": {"total_step": 10},
        "IA3": {"feedforward_modules": ["down_proj"]},
        "LN_TUNING": {"target_modules": ["input_layernorm"]},
        "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(1000))},
        "UNILORA": {"save_indices": True},
    }.get(method, {})
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](task_type="CAUSAL_LM", **options).save_pretrained(str(tmp_path))
    tuner, targets = parsed(json.loads((tmp_path / "adapter_config.json").read_text()), LARGE, LIMITS)
    works = works_of(targets, 32)
    check_work(works, {}, LARGE.modules, LIMITS, tuner.smaller)
    assert len(works) > 0
    assert sum(work.reading for work in works.values()) <= LIMITS.max_multiply_adds


def test_an_oft_of_peft_0_16s_defaults_on_8b_is_taken() -> None:
    """r=8: blocks of 512."""
    options = {"r": 8, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": ["q_proj", "v_proj"]}
    tuner, targets = parsed({"peft_type": "OFT", **options}, LARGE, LIMITS)
    works = works_of(targets, 0)
    check_work(works, {}, LARGE.modules, LIMITS, tuner.smaller)
    assert 0 < sum(work.reading for work in works.values()) <= LIMITS.max_multiply_adds


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stated_is_what_is_taken(kind: str, tmp_path: Path) -> None:
    """Products as torch counts them, and bytes of the canonical parts."""
    KINDS[kind]("llama").save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    base = spec_of(tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32))
    tuner, targets = parsed(config, base, LIMITS)
    generator = torch.Generator().manual_seed(0)

    def drawn(role: str, shape: tuple[int, ...]) -> torch.Tensor:
        if role.endswith("_zeros"):
            return torch.zeros(shape)
        if role in tuner.index_roles:
            return torch.arange(shape[-1]).expand(shape) % 32
        return torch.randn(shape, generator=generator).bfloat16()

    shared = {role: drawn(role, shape) for role, shape in targets.shared.items()}
    for name, target in targets.modules.items():
        shapes = shapes_of(target, 4)
        stated = target.work(shapes)
        tensors = {role: drawn(role, shape) for role, shape in shapes.items() if f"shared_{role}" not in shared}
        with FlopCounterMode(display=False) as counter:
            parts = target.parts({**shared, **tensors})
        assert counter.get_total_flops() / 2 <= stated.reading, name
        kept = {tensor.data_ptr(): tensor.nbytes for part in parts for tensor in part.tensors}
        assert 0 < sum(kept.values()) <= stated.kept + sum(tensor.nbytes for tensor in shared.values()), name
        module = base.modules[name]
        for part in parts:
            if isinstance(part, Dense):
                weight = torch.randn(module.out_features, module.in_features, generator=generator)
                with FlopCounterMode(display=False) as counter:
                    part.change.apply(weight)
                assert counter.get_total_flops() / 2 <= stated.making, name

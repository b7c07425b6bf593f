"""In what two adapters differ: nothing is missed, and what is no difference is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from loramux_adapters.adapter_files import INITIAL_FILE, WEIGHTS_FILE
from loramux_adapters.comparing import ConfigDifference, compare
from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from support.adapters import edit_config, edit_tensors, make_adapter, tiny_model
from support.tiny_adapters import tiny_files, write_files

LIMITS = ReadLimits()
Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with the same adapter."""
    files = tiny_files(1, targets=("q_proj", "v_proj"))
    return write_files(tmp_path / "a", files), write_files(tmp_path / "b", files)


def test_the_same_bytes_are_the_same(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, LIMITS)
    assert found.is_same
    assert (found.config, found.only_a, found.only_b, found.ranks, found.modules, found.dtypes) == (
        (),
        (),
        (),
        {},
        (),
        (),
    )


def test_what_says_nothing_of_the_arithmetic_makes_no_other_adapter(pair: tuple[Path, Path]) -> None:
    a, b = pair
    edit_config(
        b, base_model_name_or_path="elsewhere", lora_dropout=0.5, target_modules=["v_proj", "q_proj"], bias=None
    )
    found = compare(a, b, LIMITS)
    assert [(d.key, d.is_arithmetic) for d in found.config] == [
        ("base_model_name_or_path", False),
        ("lora_dropout", False),
    ]
    assert found.is_same


def test_another_scale_is_another_adapter(pair: tuple[Path, Path]) -> None:
    a, b = pair
    edit_config(b, lora_alpha=32, use_rslora=True)
    found = compare(a, b, LIMITS)
    assert not found.is_same
    assert found.config == (
        ConfigDifference("lora_alpha", 4, 32, True),
        ConfigDifference("use_rslora", None, True, True),
    )
    assert found.modules == ()


def test_modules_come_by_how_far_they_are_apart(pair: tuple[Path, Path]) -> None:
    a, b = pair

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{PREFIX}{Q0}.lora_B.weight"][3, 2] += 0.125
        tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"] *= 2
        return tensors

    edit_tensors(b, change)
    found = compare(a, b, LIMITS)
    assert [(d.module, d.tensor) for d in found.modules] == [
        ("model.layers.1.self_attn.v_proj", "lora_A.weight"),
        (Q0, "lora_B.weight"),
    ]
    far, near = found.modules
    assert far.relative == pytest.approx(0.5)
    assert near.largest == pytest.approx(0.125)
    assert 0 < near.distance < 0.1
    back = compare(b, a, LIMITS)
    assert back.modules == found.modules


def test_ranks_and_modules_of_one_only(tmp_path: Path) -> None:
    a = write_files(tmp_path / "a", tiny_files(1, rank=4, targets=("q_proj", "k_proj"), layers=(0, 1)))
    b = write_files(tmp_path / "b", tiny_files(1, rank=8, targets=("q_proj", "v_proj"), layers=(0,)))
    found = compare(a, b, LIMITS)
    assert found.ranks == {Q0: (4, 8)}
    assert found.only_a == tuple(sorted(f"model.layers.{layer}.self_attn.{leaf}" for layer, leaf in
                                        ((0, "k_proj"), (1, "k_proj"), (1, "q_proj"))))  # fmt: skip
    assert found.only_b == ("model.layers.0.self_attn.v_proj",)
    assert [(d.module, d.relative, d.largest) for d in found.modules] == [(Q0, None, None)]


def test_another_dtype_is_another_digest(pair: tuple[Path, Path]) -> None:
    a, b = pair

    def round_to_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    for directory in (a, b):
        edit_tensors(directory, round_to_half)
    edit_tensors(b, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    found = compare(a, b, LIMITS)
    assert (found.modules, len(found.dtypes), found.is_same) == ((), 8, False)


def test_parts_beside_the_pair_belong_to_their_module(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    a = make_adapter(model, tmp_path / "a", seed=1, r=4, target_modules=["c_attn"], bias="all", use_dora=True)
    b = make_adapter(model, tmp_path / "b", seed=2, r=4, target_modules=["c_attn"], bias="all", use_dora=True)
    found = compare(a, b, LIMITS)
    assert {difference.module for difference in found.modules} >= {
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.ln_1",
    }
    assert not any("lora" in difference.module or "base_layer" in difference.module for difference in found.modules)


def test_zeros_are_equal_and_files_that_lie_are_refused(pair: tuple[Path, Path]) -> None:
    a, b = pair
    for directory in pair:
        edit_tensors(directory, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert compare(a, b, LIMITS).is_same
    (b / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(AdapterInvalid):
        compare(a, b, LIMITS)


def test_an_initial_pair_is_content(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = pair
    copy = Path(shutil.copytree(a, tmp_path / "copy"))
    assert compare(a, copy, LIMITS).is_same
    (copy / INITIAL_FILE).write_bytes((a / WEIGHTS_FILE).read_bytes())
    for one, other in ((a, copy), (copy, a)):
        found = compare(one, other, LIMITS)
        assert (found.files, found.is_same) == ((INITIAL_FILE,), False)

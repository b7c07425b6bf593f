"""What `merge_files` refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loramux_adapters import merging_files
from loramux_adapters.adapter_files import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterConflict, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.merging_files import Merged, merge_files
from support.adapters import (
    edit_config,
    edit_tensors,
    make_adapter,
    peft_warnings_ignored,
    save,
    tiny_model,
)

LIMITS = ReadLimits()

REFUSED: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "dora": (lambda: peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "magnitudes of DoRA"),
    "loha": (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "what loha changes"),
    "ia3": (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "what ia3 changes"),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=3), "stands before the prompt"),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3), "stands before the prompt"),
    "head": (lambda: peft.LoraConfig(modules_to_save=["lm_head"], target_modules=["q_proj"]), "modules_to_save"),
    "tokens": (
        lambda: peft.LoraConfig(trainable_token_indices=[1, 2], target_modules=["q_proj"]),
        "trainable_token_indices",
    ),
    "alora": (
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5], target_modules=["q_proj"]),
        "invocation tokens on",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_exact_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model, (config, why) = tiny_model("llama"), REFUSED[kind]
    other = config()
    other.task_type = "CAUSAL_LM"
    with peft_warnings_ignored():
        save(peft.get_peft_model(tiny_model("llama"), other), tmp_path / "odd")
    terms = [(make_adapter(model, tmp_path / "lora", seed=1), 0.5), (tmp_path / "odd", 1.0)]
    with pytest.raises(AdapterIncompatible) as refused:
        merge_files(terms, tmp_path / "out", LIMITS)
    assert str(tmp_path / "odd") in str(refused.value)
    assert why in str(refused.value)
    assert not (tmp_path / "out").exists()


def _break(directory: Path, how: str) -> None:
    match how:
        case "bottleneck":
            config = {"config": {"architecture": None}, "model_class": "LlamaModel", "version": "adapters.1.0"}
            (directory / CONFIG_FILE).write_text(json.dumps(config))
        case "pissa":
            edit_config(directory, init_lora_weights="pissa")
        case "initial":
            shutil.copy(directory / WEIGHTS_FILE, directory / INITIAL_FILE)
        case "stray":
            edit_tensors(directory, lambda tensors: {**tensors, "base_model.model.x.lora_E": torch.ones(2)})
        case "unselected":
            edit_config(directory, target_modules=["q_proj"])
        case "rank":
            edit_config(directory, r=3)
        case "nan":
            edit_tensors(directory, lambda tensors: {name: each * torch.nan for name, each in tensors.items()})
        case "config":
            (directory / CONFIG_FILE).unlink()


@pytest.mark.parametrize("how", ["bottleneck", "pissa", "initial", "stray", "unselected", "rank", "nan", "config"])
def test_a_file_is_read_as_strictly_as_by_a_server(how: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    one = make_adapter(model, tmp_path / "one", seed=1)
    odd = make_adapter(model, tmp_path / "odd", seed=2)
    _break(odd, how)
    with pytest.raises((AdapterInvalid, AdapterIncompatible), match=f"^{odd}: "):
        merge_files([(one, 1.0), (odd, 1.0)], tmp_path / "out", LIMITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "one"]


def test_one_content_twice_other_shapes_and_too_high_ranks_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    one = make_adapter(model, tmp_path / "one", seed=1, r=5)
    again = make_adapter(model, tmp_path / "again", seed=1, r=5)
    out = tmp_path / "out"
    with pytest.raises(AdapterIncompatible, match=r"one and .*again are one and the same content"):
        merge_files([(one, 1.0), (again, 1.0)], out, LIMITS)
    wide = make_adapter(tiny_model("llama", hidden_size=64), tmp_path / "wide", seed=1)
    with pytest.raises(AdapterIncompatible, match=r"maps 32 to (32|16) in .*one and 64 to (32|16) in .*wide"):
        merge_files([(one, 1.0), (wide, 1.0)], out, LIMITS)
    two = make_adapter(model, tmp_path / "two", seed=2, r=5)
    with pytest.raises(AdapterIncompatible, match="the ranks come to 10, over the limit of 9; cut them"):
        merge_files([(one, 1.0), (two, 1.0)], out, ReadLimits(max_rank=9))
    assert merge_files([(one, 1.0), (two, 1.0)], out, ReadLimits(max_rank=9), rank=9).ranks == (9,)
    with pytest.raises(ValueError, match="a weight must be from 1e-06 to 100, not 0"):
        merge_files([(one, 0.0), (two, 1.0)], tmp_path / "none", LIMITS)


def _merge(tmp_path: Path, seeds: tuple[int, int], **options: Any) -> Merged:
    model = tiny_model("llama")
    terms = [(make_adapter(model, tmp_path / f"in{seed}", seed=seed), 1.0) for seed in seeds]
    return merge_files(terms, tmp_path / "out", LIMITS, **options)


def test_out_appears_at_once_and_replaces_adapters_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _merge(tmp_path, (1, 2))
    before = (out / WEIGHTS_FILE).read_bytes()
    with pytest.raises(AdapterConflict, match="out exists; choose another directory, or --force"):
        _merge(tmp_path, (1, 3))

    def fail(directory: Path, *_: Any) -> None:
        (directory / CONFIG_FILE).write_text("{")
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(merging_files, "write_files", fail)
        with pytest.raises(OSError, match="no space"):
            _merge(tmp_path, (1, 3), force=True)
    assert (out / WEIGHTS_FILE).read_bytes() == before
    _merge(tmp_path, (1, 3), force=True)
    assert (out / WEIGHTS_FILE).read_bytes() != before
    (out / "thesis.tex").write_text("x")
    with pytest.raises(AdapterConflict, match=r"out holds thesis.tex, which is no file of an adapter"):
        _merge(tmp_path, (1, 2), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in1", "in2", "in3", "out"]


def test_nothing_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no adapter to merge"):
        merge_files([], tmp_path / "out", ReadLimits())
    assert not (tmp_path / "out").exists()

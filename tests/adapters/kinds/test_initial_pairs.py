"""Adapters that took their initial values from the base: exact with their initial pair, refused without a way."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model

from loramux_adapters.adapter_files import INITIAL_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.spec import BaseModelSpec
from support.adapters import edit_config, files_of, peft_warnings_ignored, save
from support.against_peft import assert_equal_to_peft, engine_for, prompts
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.kinds import ask_oracle, dequantized_model, targets_of

METHODS = ("pissa", "olora")


# Not on gpt2: PEFT's OLoRA takes the factors of its transposed weights in the wrong order.
def make(checkpoint: Path, root: Path, method: str, architecture: str) -> dict[str, Path]:
    """The same adapter as PEFT converts it, and as it was trained with its initial pair beside it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=method, **targets_of(architecture))
    with peft_warnings_ignored(), torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(copy.deepcopy(dequantized_model(checkpoint)), config)
        wrapped.peft_config["default"].init_lora_weights = True
        initial = save(wrapped, root / f"{method}-initial")
        wrapped.peft_config["default"].init_lora_weights = method
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        converted = save(
            copy.deepcopy(wrapped), root / f"{method}-converted", path_initial_model_for_weight_conversion=str(initial)
        )
        pair = save(wrapped, root / f"{method}-pair")
    shutil.copy(initial / WEIGHTS_FILE, pair / INITIAL_FILE)
    return {f"{method}-converted": converted, f"{method}-pair": pair}


@pytest.fixture(scope="module", params=("llama", "qwen2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(request.param), root / "base")
    adapters: dict[str, Path] = {}
    for method in METHODS:
        adapters |= make(checkpoint, root, method, request.param)
    return checkpoint, adapters


def test_with_their_pair_they_equal_what_peft_converts(case: tuple[Path, dict[str, Path]]) -> None:
    checkpoint, adapters = case
    converted = {name: adapters[name.replace("pair", "converted")] for name in adapters}
    names = [None, *adapters]
    truths = ask_oracle(checkpoint, converted, list(zip(names, prompts(len(names)), strict=True)))
    assert_equal_to_peft(engine_for(checkpoint, adapters), truths)


@pytest.fixture(scope="module")
def spec(case: tuple[Path, dict[str, Path]]) -> BaseModelSpec:
    return float_base(case[0]).spec


@pytest.fixture
def pair(case: tuple[Path, dict[str, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(case[1]["pissa-pair"], tmp_path / "pair"))


def declare(directory: Path, **content: object) -> None:
    declared = {f"loramux_base_{key}": value for key, value in content.items()}
    (directory / "loramux.json").write_text(json.dumps(declared))


def test_the_pair_is_content(pair: Path, spec: BaseModelSpec, case: tuple[Path, dict[str, Path]]) -> None:
    first = read(files_of(pair), spec, ReadLimits())
    assert first.spec.max_rank == 8
    shutil.copy(case[1]["olora-pair"] / INITIAL_FILE, pair / INITIAL_FILE)
    assert read(files_of(pair), spec, ReadLimits()).spec.digest != first.spec.digest


def test_the_doubled_rank_counts(pair: Path, spec: BaseModelSpec) -> None:
    with pytest.raises(AdapterIncompatible, match="rank 8, with the initial pair, is over this server's limit of 7"):
        read(files_of(pair), spec, ReadLimits(max_rank=7))


def test_without_a_way_they_are_refused_with_all_of_them(pair: Path, spec: BaseModelSpec) -> None:
    (pair / INITIAL_FILE).unlink()
    with pytest.raises(AdapterInvalid, match="'pissa' moved the base weights") as refusal:
        read(files_of(pair), spec, ReadLimits())
    for way in ("path_initial_model_for_weight_conversion", INITIAL_FILE, "loramux_base_is_residual"):
        assert way in refusal.value.remedy


def test_on_the_residual_base_they_are_taken_as_they_are(pair: Path, spec: BaseModelSpec) -> None:
    (pair / INITIAL_FILE).unlink()
    declare(pair, fingerprint=spec.fingerprint, is_residual=True)
    assert read(files_of(pair), spec, ReadLimits()).spec.max_rank == 4
    other = "0" * 64
    wrong = ({"fingerprint": spec.fingerprint}, {"is_residual": True}, {"fingerprint": other, "is_residual": True})
    for content in wrong:
        declare(pair, **content)
        with pytest.raises((AdapterInvalid, AdapterIncompatible)):
            read(files_of(pair), spec, ReadLimits())


def test_loftq_has_no_pair_that_would_do(pair: Path, spec: BaseModelSpec) -> None:
    edit_config(pair, init_lora_weights="loftq")
    with pytest.raises(AdapterInvalid, match="moved the base weights") as refusal:
        read(files_of(pair), spec, ReadLimits())
    assert INITIAL_FILE not in refusal.value.remedy


@pytest.mark.parametrize("what", ["pair", "residual"])
def test_a_way_that_is_not_needed_is_refused(pair: Path, spec: BaseModelSpec, what: str) -> None:
    edit_config(pair, init_lora_weights=True)
    if what == "residual":
        (pair / INITIAL_FILE).unlink()
        declare(pair, fingerprint=spec.fingerprint, is_residual=True)
    with pytest.raises(AdapterInvalid, match="has no meaning"):
        read(files_of(pair), spec, ReadLimits())


def test_a_malformed_declaration_is_refused(pair: Path, spec: BaseModelSpec) -> None:
    declare(pair, is_residual="yes")
    with pytest.raises(AdapterInvalid, match="neither true nor false"):
        read(files_of(pair), spec, ReadLimits())

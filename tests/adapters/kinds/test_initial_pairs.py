"""Adapters that took their initial values from the base: exact with their initial pair, refused without a way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loramux_adapters.adapter_files import INITIAL_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.spec import BaseModelSpec
from support.adapters import edit_config, files_of
from support.against_peft import assert_equal_to_peft, engine_for, prompts
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.initial_pairs import make_initial_pair
from support.kinds import ask_oracle, targets_of

METHODS = ("pissa", "olora")


# Not on gpt2: PEFT's OLoRA takes the factors of its transposed weights in the wrong order.
@pytest.fixture(scope="module", params=("llama", "qwen2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("case")
    checkpoint = save_checkpoint(wide_model(request.param), root / "base")
    adapters: dict[str, Path] = {}
    for method in METHODS:
        adapters |= make_initial_pair(checkpoint, root, method, **targets_of(request.param))
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

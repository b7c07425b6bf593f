"""Files of every method that are not what PEFT would have written, and configs that ask for what is not in them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.peft.unserved import UNSERVED
from loramux_adapters.formats.registry import PEFT_METHODS, read
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from support.adapters import CONFIG, WEIGHTS, files_of
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.module_kinds import KINDS, butterflies, make_module_kind

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

MODULE = "base_model.model.model.layers.0.self_attn.q_proj."
# Copies of what all modules share: PEFT does without.
OPTIONAL = (".randlora_A", ".randlora_B")
# They adapt no linear map.
NOT_OF_MODULES = {
    "CARTRIDGE",
    "CPT",
    "LN_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "TRAINABLE_TOKENS",
}


class Made:
    """Each kind's directory, made once."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = save_checkpoint(wide_model("llama"), root / "base")
        self.spec: BaseModelSpec = float_base(self.checkpoint).spec
        self._root = root
        self.of = functools.cache(self._make)

    def _make(self, name: str) -> tuple[Config, Tensors]:
        out = make_module_kind(self.checkpoint, self._root / name, name, "llama")
        return json.loads((out / CONFIG).read_text()), load_file(out / WEIGHTS)

    def read(self, config: Config, tensors: Tensors) -> AdapterWeights:
        directory = self._root / "read"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / CONFIG).write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
        return read(files_of(directory), self.spec, ReadLimits())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with butterflies():
        yield Made(tmp_path_factory.mktemp("made"))


def of_one_module(tensors: Tensors) -> list[str]:
    """The tensors of one module, and those that all share."""
    return [name for name in tensors if name.startswith(MODULE) or not name.startswith("base_model.model.")]


def missing(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name in of_one_module(tensors):
        if not name.startswith(MODULE) or not name.endswith(OPTIONAL):
            yield config, {key: tensor for key, tensor in tensors.items() if key != name}


def unknown_name(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name in of_one_module(tensors):
        yield config, tensors | {f"{name}.more": torch.ones(1)}


def of_another_module(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name, tensor in tensors.items():
        if name.startswith(MODULE):
            yield config, tensors | {name.replace("q_proj", "k_proj"): tensor.clone()}


def of_no_module(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name, tensor in tensors.items():
        if name.startswith(MODULE):
            yield config, tensors | {name.replace("layers.0", "layers.9"): tensor.clone()}


def another_shape(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name in of_one_module(tensors):
        tensor = tensors[name]
        for wrong in (tensor[None], torch.cat([tensor, tensor[:1]]), tensor.flatten()[:-1], tensor.flatten()[:0]):
            if tensor.numel() or wrong.dim() != 1:
                yield config, tensors | {name: wrong.clone()}


def not_finite(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name in of_one_module(tensors):
        if tensors[name].is_floating_point() and tensors[name].numel():
            for value in (torch.nan, torch.inf):
                wrong = tensors[name].clone()
                wrong.view(-1)[-1] = value
                yield config, tensors | {name: wrong}


def no_positions(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    for name in of_one_module(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point():
            yield config, tensors | {name: tensor.to(torch.int32)}
        else:
            for value in (-1.0, 0.5, 1e9):
                wrong = tensor.float()
                wrong.view(-1)[-1] = value
                yield config, tensors | {name: wrong}


def unknown_key(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    yield config | {"surprise": 1}, tensors


def another_method(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    yield config | {"peft_type": "IA3" if config["peft_type"] != "IA3" else "HRA"}, tensors


def another_bias(config: Config, tensors: Tensors) -> Iterator[tuple[Config, Tensors]]:
    yield config | {"bias": "everything"}, tensors


Fault = Callable[[Config, Tensors], Iterator[tuple[Config, Tensors]]]
FAULTS: dict[Fault, tuple[type[AdapterError], ...]] = {
    missing: (AdapterInvalid, AdapterIncompatible),
    unknown_name: (AdapterInvalid,),
    of_another_module: (AdapterInvalid,),
    of_no_module: (AdapterIncompatible,),
    another_shape: (AdapterInvalid, AdapterIncompatible),
    not_finite: (AdapterInvalid,),
    no_positions: (AdapterInvalid,),
    unknown_key: (AdapterInvalid,),
    another_method: (AdapterInvalid,),
    another_bias: (AdapterInvalid,),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_peft_would_not_have_written_is_refused(name: str, made: Made) -> None:
    config, tensors = made.of(name)
    made.read(config, tensors)
    for fault, errors in FAULTS.items():
        for wrong_config, wrong_tensors in fault(config, tensors):
            with pytest.raises(errors) as refusal:
                made.read(wrong_config, wrong_tensors)
            assert refusal.value.subject, fault.__name__
            assert refusal.value.remedy, fault.__name__


NOT_READ: list[tuple[str, Config, str]] = [
    ("oft", {"peft_version": "0.17.1"}, "another one before PEFT 0.18"),
    ("oft", {"peft_version": None}, "another one before PEFT 0.18"),
    ("oft", {"r": 4}, "exactly one of it and r must be 0"),
    ("oft", {"num_cayley_neumann_terms": 65}, "65 is over 64"),
    ("boft", {"boft_block_num": 4}, "exactly one of it and boft_block_num must be 0"),
    ("road-1", {"variant": "road_3"}, "is none of road_1, road_2, road_4"),
    ("road-1", {"group_size": 7}, "is not even"),
    ("fourierft", {"random_loc_seed": None}, "is not a seed"),
    ("fourierft", {"n_frequency": 0}, "is not a whole number from 1"),
    ("fourierft", {"n_frequency": 128 * 192 + 1}, "is more than the"),
    ("waveft", {"wavelet_family": "sym4"}, "'sym4' is not supported"),
    ("waveft", {"n_frequency_pattern": {"v_proj": 0}}, "is not a whole number from 1"),
    ("randlora", {"save_projection": False}, "another machine may draw others"),
    ("pvera", {"save_projection": False}, "another machine may draw others"),
    ("pvera", {"sample_at_inference": True}, "drawn anew each time are not supported"),
    ("tinylora", {"save_projection": False}, "another machine may draw others"),
    ("tinylora", {"weight_tying": 2}, "is not between 0 and 1"),
    ("unilora", {"save_indices": False}, "is not in the file"),
    ("vblora", {"topk": 13}, "is more than the 12 vectors"),
    ("supertuning", {"save_precomputed_indices": False}, "the positions are not in the file"),
    ("supertuning", {"sparsity": 1}, "is not from 0 to below 1"),
    ("shira", {"r": 1000}, "is more than the"),
    ("glora", {"config_C": "constant"}, "is none of lora, vector, none"),
    ("oft", {"bias": "oft_only"}, "trains biases that PEFT does not save"),
]


@pytest.mark.parametrize(("name", "change", "why"), NOT_READ)
def test_a_config_that_asks_for_what_cannot_be_exact_is_refused(
    name: str, change: Config, why: str, made: Made
) -> None:
    config, tensors = made.of(name)
    with pytest.raises(AdapterInvalid, match=why) as refusal:
        made.read(config | change, tensors)
    assert next(iter(change)) in str(refusal.value)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("boft", {"boft_block_size": 7}, "boft_block_size does not divide the 128 inputs"),
        ("boft", {"boft_n_butterfly_factor": 9}, "boft_n_butterfly_factor does not divide"),
        ("boft", {"boft_n_butterfly_factor": 60_000}, "boft_n_butterfly_factor does not divide"),
        ("road-1", {"group_size": 48}, "group_size 48 does not divide the 128 outputs"),
        ("c3a", {"block_size": 48}, "block_size 48 does not divide"),
        ("vblora", {"vector_length": 48}, "vector_length 48 does not divide"),
    ],
)
def test_a_config_for_other_sizes_is_refused(name: str, change: Config, why: str, made: Made) -> None:
    config, tensors = made.of(name)
    with pytest.raises(AdapterIncompatible, match=why):
        made.read(config | change, tensors)


def test_copies_of_what_all_modules_share_must_be_copies(made: Made) -> None:
    config, tensors = made.of("randlora")
    without = {name: tensor for name, tensor in tensors.items() if "base_model.model" not in name or "_A" not in name}
    assert len(without) < len(tensors)
    made.read(config, without)
    name = f"{MODULE}randlora_B"
    with pytest.raises(AdapterInvalid, match=r"randlora_B of module .* is not the one that all modules share"):
        made.read(config, tensors | {name: tensors[name] + 1})


def test_a_vector_is_taken_once(made: Made) -> None:
    config, tensors = made.of("vblora-topk")
    name = f"{MODULE}vblora_logits_A_topk_indices"
    twice = tensors[name].clone()
    twice[0, 0, 1] = twice[0, 0, 0]
    with pytest.raises(AdapterInvalid, match="takes one vector twice"):
        made.read(config, tensors | {name: twice})


def test_what_is_written_as_nothing_must_be_nothing(made: Made) -> None:
    config, tensors = made.of("glora")
    name = f"{MODULE}glora_C.zeros"
    with pytest.raises(AdapterInvalid, match=r"glora_C\.zeros of module .* is not zero"):
        made.read(config, tensors | {name: tensors[name] + 1})


def test_wide_blocks_are_refused(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    monkeypatch.setattr("loramux_adapters.formats.peft.rotations.MAX_BLOCK", 8)
    for name in ("oft", "boft-num"):
        with pytest.raises(AdapterIncompatible, match="this server takes at most 8"):
            made.read(*made.of(name))


def test_many_drawn_positions_are_refused(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    monkeypatch.setattr("loramux_adapters.formats.peft.positions.MAX_DRAWN", 100)
    with pytest.raises(AdapterInvalid, match="n_frequency: draws 200 of"):
        made.read(*made.of("fourierft"))


@pytest.mark.parametrize("method", UNSERVED)
def test_a_method_that_is_not_served_says_why(method: str, made: Made) -> None:
    _, tensors = made.of("hra")
    with pytest.raises(AdapterInvalid) as refusal:
        made.read({"peft_type": method, "target_modules": ["q_proj"]}, tensors)
    assert f"{UNSERVED[method].name} adapters are not served: {UNSERVED[method].why}" in str(refusal.value)
    assert refusal.value.remedy


def test_every_method_of_peft_is_served_or_refused_for_itself() -> None:
    served = {tuner.peft_type for tuner in PEFT_METHODS}
    assert not served & set(UNSERVED)
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - NOT_OF_MODULES <= served | set(UNSERVED)
    with_cases = {config("llama").peft_type.value for config in KINDS.values()}
    assert served - {"LORA"} - NOT_OF_MODULES == with_cases

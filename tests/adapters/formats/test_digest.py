"""The digest is the version: the same arithmetic on the same bytes, and nothing else, gives the same one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loramux_adapters.errors import AdapterError
from loramux_adapters.formats.digest import AdapterDigest, digest_with_text, low_rank_config
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from support.adapters import CONFIG, WEIGHTS, edit_config, edit_tensors, files_of, make_adapter, spec_of, tiny_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("gpt2", tie_word_embeddings=False)


@pytest.fixture
def adapter(model: PreTrainedModel, tmp_path: Path) -> Path:
    options: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "r": 4, "lora_alpha": 8, "bias": "lora_only"}
    return make_adapter(model, tmp_path, rank_pattern={"c_fc": 2}, alpha_pattern={"h.0.mlp.c_fc": 3}, **options)


def digest_of(adapter: Path, model: PreTrainedModel) -> str:
    return read(files_of(adapter), spec_of(model), ReadLimits()).spec.digest


def outcome(adapter: Path, model: PreTrainedModel) -> str:
    """The digest, or what the refusal names."""
    try:
        return digest_of(adapter, model)
    except AdapterError as error:
        return f"refused: {error.subject}"


def test_it_is_stable(adapter: Path, model: PreTrainedModel) -> None:
    digest = digest_of(adapter, model)
    assert len(digest) == 64
    assert digest == digest_of(adapter, model)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["mlp.c_fc", "c_fc", "attn.c_attn"]},
        {"target_modules": r".*\.(c_attn|c_fc)"},
        {"rank_pattern": {"mlp.c_fc": 2, "unused": 7}},
        {"alpha_pattern": {r"^transformer\.h\.0\.mlp\.c_fc$": 3.0}},
        {"r": 4, "lora_alpha": 8.0},
        {"r": 2, "lora_alpha": 3, "rank_pattern": {"c_attn": 4}, "alpha_pattern": {"c_attn": 8, "h.1.mlp.c_fc": 8}},
        {"peft_version": "0.30", "lora_dropout": 0.1, "inference_mode": False, "fan_in_fan_out": False},
        {"base_model_name_or_path": "elsewhere", "revision": "main", "auto_mapping": {"parent_library": "x"}},
        {"option_of_peft_9": None},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_spelling_does_not_matter(change: dict[str, Any], adapter: Path, model: PreTrainedModel) -> None:
    before = digest_of(adapter, model)
    edit_config(adapter, **change)
    assert digest_of(adapter, model) == before


def test_order_in_the_files_does_not_matter(adapter: Path, model: PreTrainedModel) -> None:
    before = digest_of(adapter, model)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    tensors = load_file(adapter / WEIGHTS)
    save_file(dict(reversed(tensors.items())), adapter / WEIGHTS, metadata={"other": "words"})
    assert digest_of(adapter, model) == before


CONFIG_MUTATIONS: list[dict[str, Any]] = [
    {"lora_alpha": 9},
    {"lora_alpha": -8},
    {"use_rslora": True},
    {"alpha_pattern": {}},
    {"alpha_pattern": {"h.1.mlp.c_fc": 3}},
    {"alpha_pattern": {"c_fc": 3}},
    {"rank_pattern": {}},
    {"rank_pattern": {"c_fc": 4}},
    {"rank_pattern": {"h.0.mlp.c_fc": 2}},
    {"r": 2},
    {"target_modules": ["c_attn"]},
    {"target_modules": ["c_attn", "c_fc", "c_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": ["c_fc", "transformer.h.0.attn.c_attn"]},
    {"exclude_modules": ["h.0.mlp.c_fc"]},
    {"layers_to_transform": [0]},
    {"bias": "none"},
    {"bias": "all"},
]


@pytest.mark.parametrize("change", CONFIG_MUTATIONS, ids=str)
def test_a_config_that_means_something_else_is_noticed(
    change: dict[str, Any], adapter: Path, model: PreTrainedModel
) -> None:
    before = digest_of(adapter, model)
    edit_config(adapter, **change)
    assert outcome(adapter, model) != before


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def one_bit(tensors: Tensors) -> Tensors:
    first = min(tensors)
    raw = tensors[first].view(torch.int32).clone()
    raw.view(-1)[0] ^= 1
    return tensors | {first: raw.view(torch.float32)}


TENSOR_MUTATIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "one bit": one_bit,
    "swapped layers": lambda t: renamed(renamed(renamed(t, "h.0.", "h.x."), "h.1.", "h.0."), "h.x.", "h.1."),
    "A and B swapped names": lambda t: renamed(renamed(renamed(t, "lora_A", "x"), "lora_B", "lora_A"), "x", "lora_B"),
    "dtype": lambda t: {name: tensor.half() for name, tensor in t.items()},
    "one tensor less": lambda t: dict(sorted(t.items())[1:]),
    "other target": lambda t: renamed(t, "c_attn", "c_proj"),
    "no prefix": lambda t: renamed(t, "base_model.model.", ""),
    "adapter name": lambda t: renamed(t, "lora_A.", "lora_A.default."),
}


@pytest.mark.parametrize("mutation", TENSOR_MUTATIONS)
def test_other_tensors_are_noticed(mutation: str, adapter: Path, model: PreTrainedModel) -> None:
    before = digest_of(adapter, model)
    edit_tensors(adapter, TENSOR_MUTATIONS[mutation])
    assert outcome(adapter, model) != before


def test_it_is_over_the_bytes_as_uploaded_and_states_its_framing() -> None:
    """Written out by hand, so that nobody changes what identifies every stored adapter without noticing."""
    digest = AdapterDigest()
    digest.add_tensor("m:a", "F32", (1, 2), b"12345678")
    digest.add_tensor("m:b", "F16", (), b"12")
    assert digest.finish(low_rank_config({"m": 0.5})) == (
        "afe966668fa2e9ed84887a45c7ea2bc23ae68724e90b563a39fb1be90bbd34bb"
    )


def test_what_texts_mean_is_part_of_it(adapter: Path, model: PreTrainedModel) -> None:
    """By the bytes of the files alone, whatever base reads them: a library's next version spells them as it likes."""
    found = [digest_of(adapter, model)]
    for name, data in (("tokenizer.json", b"a"), ("tokenizer.json", b"b"), ("chat_template.jinja", b"a")):
        (adapter / name).write_bytes(data)
        found.append(digest_of(adapter, model))
    assert len(set(found)) == 4
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapter / name).unlink()
    assert digest_of(adapter, model) == found[0]
    assert digest_with_text("ab" * 32, [("tokenizer.json", "cd" * 32)]) == (
        "9d1f1e3bc8b9ee40d111420d9bb6f1bb0a386ad5c9d2d672b6f2a29fe3a9e38b"
    )


def test_fields_cannot_run_into_each_other() -> None:
    digests = set()
    for name, dtype, data in [("ab", "c", b""), ("a", "bc", b""), ("a", "b", b"c"), ("a", "b", b"")]:
        digest = AdapterDigest()
        digest.add_tensor(name, dtype, (), data)
        digests.add(digest.finish({}))
    assert len(digests) == 4


def test_tensors_must_come_in_order() -> None:
    digest = AdapterDigest()
    digest.add_tensor("b", "F32", (), b"")
    with pytest.raises(ValueError, match="must come after"):
        digest.add_tensor("a", "F32", (), b"")

"""AdapterHub's directories: what is read of them, what is refused and how, and what their digest is over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.adapter_files import ADAPTERHUB_WEIGHTS_FILE, CONFIG_FILE, INTERFACE_FILE, WEIGHTS_FILE
from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.bottleneck import Bottleneck
from loramux_adapters.weights import AdapterWeights
from support.adapters import files_of, spec_of, tiny_model
from support.bottlenecks import ADAPTER_PLUS, DOUBLE_SEQ_BN, NAME, PAR_BN, SEQ_BN, make_bottleneck

Tensors = dict[str, torch.Tensor]
SAVE = "with_head=False, use_safetensors=True"


def make(out: Path, options: dict[str, Any], architecture: str = "llama") -> Path:
    return make_bottleneck(tiny_model(architecture), out / "adapter", options, seed=3)


def read_directory(directory: Path, architecture: str = "llama") -> AdapterWeights:
    return read(files_of(directory), spec_of(tiny_model(architecture)), ReadLimits())


def edit(directory: Path, *, inner: dict[str, Any] | None = None, **outer: Any) -> None:
    """Sets keys of the config, under "config" and beside it; `...` removes one."""
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    config["config"] |= inner or {}
    config |= outer
    for part in (config, config["config"]):
        if isinstance(part, dict):
            for key in [key for key, value in part.items() if value is ...]:
                del part[key]
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(directory / ADAPTERHUB_WEIGHTS_FILE))
    save_file(tensors, directory / ADAPTERHUB_WEIGHTS_FILE)


def test_the_canonical_form(tmp_path: Path) -> None:
    weights = read_directory(make(tmp_path, {**DOUBLE_SEQ_BN, "scaling": 2.0, "leave_out": [1]}))
    assert weights.spec.kind == "bottleneck"
    assert weights.spec.targets == ("attention_output", "mlp_output")
    assert set(weights.modules) == {"layers.0.attention_output", "layers.0.mlp_output"}
    part = weights.modules["layers.0.mlp_output"].get(Bottleneck)
    assert part is not None
    stored = load_file(tmp_path / "adapter" / ADAPTERHUB_WEIGHTS_FILE)
    own = f"model.layers.0.output_adapters.adapters.{NAME}."
    torch.testing.assert_close(part.up, 2 * stored[f"{own}adapter_up.weight"])
    torch.testing.assert_close(part.up_bias, 2 * stored[f"{own}adapter_up.bias"])
    torch.testing.assert_close(part.down, stored[f"{own}adapter_down.0.weight"])
    assert part.form.activation == "silu"
    assert weights.spec.nbytes == sum(tensor.numel() * 4 for tensor in stored.values())


ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another name of the activation": (DOUBLE_SEQ_BN, {"non_linearity": "SiLU"}),
    "what training alone reads": (SEQ_BN, {"dropout": 0.1, "init_weights": "mam_adapter", "phm_dim": 8}),
    "a key that is the default": (SEQ_BN, {"scaling": 1, "leave_out": ...}),
    "norms that a parallel one has none of": (PAR_BN, {"original_ln_before": True, "residual_before_ln": "post_add"}),
    "a residual within no norm": (SEQ_BN, {"adapter_residual_before_ln": True}),
    "a map of reductions": (SEQ_BN, {"reduction_factor": {"0": 16, "default": 16.0}}),
}


@pytest.mark.parametrize("case", ALIKE)
def test_two_spellings_of_one_arithmetic_have_one_digest(case: str, tmp_path: Path) -> None:
    options, changes = ALIKE[case]
    directory = make(tmp_path, options)
    digest = read_directory(directory).spec.digest
    edit(directory, inner=changes)
    assert read_directory(directory).spec.digest == digest


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "activation": (SEQ_BN, {"non_linearity": "gelu"}),
    "scale": (PAR_BN, {"scaling": 2.0}),
    "what it reads": (SEQ_BN, {"original_ln_before": False}),
    "what it adds": (SEQ_BN, {"residual_before_ln": False}),
    "the layer's residual": (SEQ_BN, {"original_ln_after": False}),
    "where it is": (SEQ_BN, {"is_parallel": True}),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_arithmetic_has_another_digest(case: str, tmp_path: Path) -> None:
    options, changes = DIFFERENT[case]
    directory = make(tmp_path, options)
    digest = read_directory(directory).spec.digest
    edit(directory, inner=changes)
    assert read_directory(directory).spec.digest != digest


def test_names_of_a_bare_model_are_the_same_adapter(tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN)
    digest = read_directory(directory).spec.digest
    edit_tensors(directory, lambda tensors: {name.removeprefix("model."): each for name, each in tensors.items()})
    assert read_directory(directory).spec.digest == digest


def test_the_norm_before_has_two_names_and_is_one_tensor(tmp_path: Path) -> None:
    directory = make(tmp_path, {**SEQ_BN, "ln_before": True})
    digest = read_directory(directory).spec.digest
    stored = load_file(directory / ADAPTERHUB_WEIGHTS_FILE)
    for spelling in ("adapter_norm_before", "adapter_down.0"):
        save_file({n: each for n, each in stored.items() if spelling not in n}, directory / ADAPTERHUB_WEIGHTS_FILE)
        assert read_directory(directory).spec.digest == digest
    save_file({n: each + ("adapter_down.0" in n) for n, each in stored.items()}, directory / ADAPTERHUB_WEIGHTS_FILE)
    with pytest.raises(AdapterInvalid, match="it differs from adapter_norm_before, whose copy it is"):
        read_directory(directory)


def test_configs_without_a_version_had_other_names_of_gelu(tmp_path: Path) -> None:
    directory = make(tmp_path, {**SEQ_BN, "non_linearity": "gelu"})
    for version, expected in (("adapters.1.3.0", "gelu"), (..., "gelu_tanh")):
        edit(directory, version=version)
        part = read_directory(directory).modules["layers.0.mlp_output"].get(Bottleneck)
        assert part is not None
        assert part.form.activation == expected


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], type[AdapterError], str]] = {
    "compacter": ({"inner": {"phm_layer": True}}, AdapterInvalid, "phm_layer: Compacter's hypercomplex layers are not"),
    "invertible": ({"inner": {"inv_adapter": "nice"}}, AdapterInvalid, "inv_adapter: invertible adapters are not"),
    "gates": ({"inner": {"use_gating": True}}, AdapterInvalid, "use_gating: gates .* mean over the whole sequence"),
    "prefix": ({"inner": {"architecture": "prefix_tuning"}}, AdapterInvalid, "architecture: prefix tuning in Adapter"),
    "lora": ({"inner": {"architecture": "lora"}}, AdapterInvalid, "LoRA and its kin .* train with PEFT what PEFT has"),
    "union": ({"inner": {"architecture": "union"}}, AdapterInvalid, "unions of methods"),
    "a later method": ({"inner": {"architecture": "later"}}, AdapterInvalid, "architecture: 'later' is not read"),
    "a method of no text": ({"inner": {"architecture": []}}, AdapterInvalid, "architecture: \\[\\] is not read"),
    "unknown key": ({"inner": {"moe": 4}}, AdapterInvalid, "'moe': is not a known option"),
    "unknown outer key": ({"moe": 4}, AdapterInvalid, "'moe': is not a known option"),
    "config by name": ({"config": "pfeiffer"}, AdapterInvalid, "config: 'pfeiffer' names a configuration"),
    "nowhere": ({"inner": {"output_adapter": False}}, AdapterInvalid, "the adapter is nowhere"),
    "no layer": ({"inner": {"leave_out": [0, 1]}}, AdapterInvalid, "leave_out: leaves no layer"),
    "layers of text": ({"inner": {"leave_out": ["0"]}}, AdapterInvalid, "leave_out: must be a list of layer numbers"),
    "no reduction": ({"inner": {"reduction_factor": ...}}, AdapterInvalid, "reduction_factor: None is not a finite"),
    "reduction of 0": ({"inner": {"reduction_factor": 0}}, AdapterInvalid, "reduction_factor: 0 is below"),
    "a tiny reduction": ({"inner": {"reduction_factor": 5e-324}}, AdapterInvalid, "reduction_factor: 5e-324 is below"),
    "no reductions": ({"inner": {"reduction_factor": {}}}, AdapterInvalid, "reduction_factor: {} is below"),
    "reduction without default": (
        {"inner": {"reduction_factor": {"0": 16}}},
        AdapterInvalid,
        "reduction_factor: has no number for layer 1, and no default",
    ),
    "another width": ({"inner": {"reduction_factor": 8}}, AdapterIncompatible, r"shape \[2\] should be \[4\]"),
    "activation": ({"inner": {"non_linearity": "prelu"}}, AdapterInvalid, "non_linearity: 'prelu' is not supported"),
    "no activation": ({"inner": {"non_linearity": None}}, AdapterInvalid, "non_linearity: None is no text"),
    "scaling": ({"inner": {"scaling": "big"}}, AdapterInvalid, "scaling: 'big' is not a finite number"),
    "scaling too far": ({"inner": {"scaling": 1e300}}, AdapterInvalid, "scaling: it makes adapter_up infinite"),
    "learned scaling without it": ({"inner": {"scaling": "learned"}}, AdapterInvalid, "scaling' is missing"),
    "flag": ({"inner": {"is_parallel": 1}}, AdapterInvalid, "is_parallel: 1 is neither true nor false"),
    "post_add": ({"inner": {"residual_before_ln": "post_add"}}, AdapterInvalid, "residual_before_ln: post_add is for"),
    "another architecture": ({"model_type": "bert"}, AdapterIncompatible, "model_type: 'bert' is not 'llama'"),
    "another size": ({"hidden_size": 64}, AdapterIncompatible, "hidden_size: 64 is not the base's 32"),
    "another name": ({"name": "other"}, AdapterInvalid, "it is no tensor of a bottleneck that adapter_config.json"),
    "an endless name": ({"name": "x" * 1000}, AdapterInvalid, "name: 'x.* is no text of 1 to 256 characters"),
    "a part left out": ({"inner": {"leave_out": [0]}}, AdapterInvalid, "it is no tensor of a bottleneck"),
    "a part too many": ({"inner": {"mh_adapter": True}}, AdapterInvalid, "attention_adapters.* is missing.* with_head"),
    "a norm too many": ({"inner": {"ln_after": True}}, AdapterInvalid, "adapter_norm_after.weight' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_configs_are_refused_by_key(case: str, tmp_path: Path) -> None:
    changes, kind, words = CONFIG_FAULTS[case]
    directory = make(tmp_path, SEQ_BN)
    edit(directory, **changes)
    with pytest.raises(kind, match=words) as refusal:
        read_directory(directory)
    assert refusal.value.subject
    assert refusal.value.remedy


DOWN = f"model.layers.0.output_adapters.adapters.{NAME}.adapter_down.0.weight"
TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {n: each for n, each in t.items() if n != DOWN}, f"{DOWN}' is missing; .*{SAVE}"),
    "of no adapter": (lambda t: t | {"words": torch.ones(1)}, "'words': it is no tensor of a bottleneck"),
    "of PEFT": (lambda t: t | {"base_model.model.lora_A.weight": torch.ones(1)}, "it is no tensor of a bottleneck"),
    "twice": (lambda t: t | {DOWN.removeprefix("model."): t[DOWN].clone()}, "in the file twice"),
    "transposed": (lambda t: t | {DOWN: t[DOWN].T.contiguous()}, r"shape \[32, 2\] should be \[2, 32\]"),
    "NaN": (lambda t: t | {DOWN: t[DOWN] * math.nan}, f"{DOWN}' holds NaN or infinite"),
    "integers": (lambda t: t | {DOWN: t[DOWN].to(torch.int32)}, "dtype 'I32'"),
}


@pytest.mark.parametrize("case", TENSOR_FAULTS)
def test_tensors_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = TENSOR_FAULTS[case]
    directory = make(tmp_path, SEQ_BN)
    edit_tensors(directory, change)
    with pytest.raises(AdapterError, match=words):
        read_directory(directory)


def test_architectures_without_a_place_are_refused(tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN)
    edit(directory, model_type="gemma")
    with pytest.raises(AdapterIncompatible, match=r"no place in layers of 'gemma'; they have one in gemma2, .*llama"):
        read_directory(directory, "gemma")


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("qwen2", ADAPTER_PLUS, "original_ln_after: false has no meaning on qwen2"),
        ("gemma2", SEQ_BN, "original_ln_before: on gemma2 adapters applies the norm of the last layer in all"),
    ],
)
def test_what_has_no_meaning_where_modules_are_hooked(
    architecture: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    directory = make(tmp_path, options, architecture)
    with pytest.raises(AdapterInvalid, match=words):
        read_directory(directory, architecture)


INTERFACE = {
    "adapter_methods": ["bottleneck"], "attn_o_proj": "o_proj", "layer_ln_1": None, "layer_ln_2": None,
    "layer_output_proj": "mlp.down_proj", "layer_pre_ffn": "post_attention_layernorm",
    "layer_pre_self_attn": "input_layernorm", "layer_self_attn": "self_attn", "model_layers": "layers",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_interface_of_a_hooked_model_is_that_of_the_sub_layers(architecture: str, tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN, architecture)
    digest = read_directory(directory, architecture).spec.digest
    path = directory / INTERFACE_FILE
    path.write_text(json.dumps({"interface": INTERFACE, "model_type": architecture}))
    assert read_directory(directory, architecture).spec.digest == digest
    for key, value in (("layer_pre_ffn", "mlp"), ("layer_output_proj", None), ("attn_o_proj", "out")):
        path.write_text(json.dumps({"interface": INTERFACE | {key: value}}))
        with pytest.raises(AdapterIncompatible, match=f"{INTERFACE_FILE}: {key}: adapters were hooked to"):
            read_directory(directory, architecture)
    path.write_text(json.dumps({"interface": INTERFACE | {"layer_ln_2": "post_attention_layernorm"}}))
    with pytest.raises(AdapterInvalid, match="the norm of the last layer"):
        read_directory(directory, architecture)
    path.write_text(json.dumps({"interface": INTERFACE}))
    edit(directory, inner={"original_ln_after": False})
    with pytest.raises(AdapterInvalid, match="original_ln_after: false has no meaning"):
        read_directory(directory, architecture)
    path.write_text("{}")
    with pytest.raises(AdapterInvalid, match="interface None is no object"):
        read_directory(directory, architecture)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_adapter.bin", f"a pickle, which is never read: save the adapter with .*{SAVE}"),
        ("model_head.safetensors", "prediction heads are not supported"),
        ("adapter_fusion_config.json", "AdapterFusion attends over several adapters and is not supported"),
    ],
)
def test_the_packages_other_files_are_refused_with_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN)
    with pytest.raises(AdapterInvalid, match=words):
        read(files_of(directory) | {name: directory / CONFIG_FILE}, spec_of(tiny_model("llama")), ReadLimits())


def test_the_weights_are_those_of_the_configs_format(tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN)
    weights = directory / ADAPTERHUB_WEIGHTS_FILE
    (directory / WEIGHTS_FILE).write_bytes(weights.read_bytes())
    with pytest.raises(AdapterInvalid, match=f"{WEIGHTS_FILE} is not a file of this adapter"):
        read_directory(directory)
    weights.unlink()
    with pytest.raises(AdapterInvalid, match=f"{ADAPTERHUB_WEIGHTS_FILE} is missing; save the adapter with .*{SAVE}"):
        read_directory(directory)


def test_a_pickle_under_its_name_is_never_unpickled(tmp_path: Path) -> None:
    directory = make(tmp_path, SEQ_BN)
    torch.save({}, directory / ADAPTERHUB_WEIGHTS_FILE)
    with pytest.raises(AdapterInvalid, match=r"adapter\.safetensors .*zip archive"):
        read_directory(directory)

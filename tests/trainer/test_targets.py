"""Which modules a job adapts, with which rank and scale: PEFT is the oracle, on seven architectures."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.errors import JobInvalid, SeveralInvalid
from loramux_trainer.job import parse_job
from loramux_trainer.schema.adapter_config import LoraConfig
from loramux_trainer.schema.presets import PRESETS
from loramux_trainer.targets import resolve_modules
from support.adapters import ARCHITECTURES, spec_of, tiny_model

ALL = (*ARCHITECTURES, "phi3")
# Per option ours for Llama and its like, for GPT-2, for Phi-3.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "all-linear": ({}, {}, {}),
    "suffixes": (
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["c_attn", "mlp.c_proj"]},
        {"target_modules": ["qkv_proj", "mlp.down_proj"]},
    ),
    "a regular expression": (
        {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
        {"target_modules": r".*\.(c_attn|mlp\.c_fc)"},
        {"target_modules": r".*layers\.1\..*_proj"},
    ),
    "all but": (
        {"exclude_modules": ["o_proj", "mlp.gate_proj"]},
        {"exclude_modules": ["attn.c_proj"]},
        {"exclude_modules": ["o_proj"]},
    ),
    "all but a regular expression": ({"exclude_modules": r".*\.0\..*"},) * 3,
    "one layer": (
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["c_attn"], "layers_to_transform": 1},
        {"target_modules": ["qkv_proj"], "layers_to_transform": 1},
    ),
    "layers by what stands before them": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
        {"target_modules": ["qkv_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]},
    ),
    "a full name beside a layer": (
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn", "transformer.h.0.mlp.c_fc"], "layers_to_transform": [1]},
        {"target_modules": ["qkv_proj", "model.layers.0.mlp.down_proj"], "layers_to_transform": [1]},
    ),
    "ranks and alphas by pattern": (
        {
            "rank_pattern": {"q_proj": 3, r"layers\.0\..*": 2, "^model.layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"self_attn.(q|k)_proj": 4, ".*_proj": 2.5},
        },
        {"rank_pattern": {"c_attn": 3, r"h\.0\..*": 2}, "alpha_pattern": {"attn.c_(proj|attn)": 4}},
        {"rank_pattern": {"qkv_proj": 3, r"layers\.0\..*": 2}, "alpha_pattern": {".*_proj": 2.5}},
    ),
    "a rank per layer, rank-stabilized": (
        {"use_rslora": True, "rank_pattern": {r"layers\.0\..*": 4, r"layers\.1\..*": 9}},
        {"use_rslora": True, "rank_pattern": {r"h\.0\..*": 4, r"h\.1\..*": 9}},
        {"use_rslora": True, "rank_pattern": {r"layers\.0\..*": 4, r"layers\.1\..*": 9}},
    ),
    **{f"preset {name}": ({"preset": name},) * 3 for name in PRESETS},
}


@cache
def tiny(architecture: str) -> PreTrainedModel:
    if architecture != "phi3":
        return tiny_model(architecture)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(Phi3Config(vocab_size=64, pad_token_id=0, **sizes))


def lora_of(**lora: Any) -> LoraConfig:
    return parse_job({"model": "m/m", "output": "o", "data": {"train": "t"}, "lora": lora}).lora


def by_peft(model: PreTrainedModel, lora: LoraConfig) -> dict[str, tuple[int, float]]:
    many = (lora.target_modules, lora.exclude_modules, lora.layers_to_transform, lora.layers_pattern)
    targets, excluded, layers, pattern = (list(each) if isinstance(each, tuple) else each for each in many)
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=layers,
        layers_pattern=pattern,
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config)
    return {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("option", OPTIONS)
def test_modules_ranks_and_scales_are_pefts(architecture: str, option: str) -> None:
    model = tiny(architecture)
    lora = lora_of(**OPTIONS[option][{"gpt2": 1, "phi3": 2}.get(architecture, 0)])
    shapes = resolve_modules(lora, spec_of(model))
    assert {name: (shape.rank, shape.scale) for name, shape in shapes.items()} == by_peft(model, lora)
    assert list(shapes) == sorted(shapes)


@pytest.mark.parametrize("architecture", ALL)
def test_the_classic_preset_adapts_what_peft_adapts_by_default(architecture: str) -> None:
    default = PEFT_DEFAULTS.get(architecture, ["qkv_proj"])  # PEFT has none for Phi-3
    assert set(resolve_modules(lora_of(preset="classic-qv-r8"), spec_of(tiny(architecture)))) == set(
        by_peft(tiny(architecture), lora_of(target_modules=default))
    )


def test_all_linear_can_be_of_some_layers() -> None:
    """Which PEFT refuses: it takes all-linear for a pattern."""
    spec = spec_of(tiny("llama"))
    shapes = resolve_modules(lora_of(layers_to_transform=1), spec)
    assert set(shapes) == {name for name in resolve_modules(lora_of(), spec) if ".layers.1." in name}


@pytest.mark.parametrize(
    ("lora", "field", "says"),
    [
        ({"exclude_modules": ["z_proj"]}, "lora.exclude_modules", "z_proj names no module of tiny-llama"),
        ({"layers_to_transform": [0, 7]}, "lora.layers_to_transform", "layer 7 of tiny-llama has none of the targets"),
        (
            {"target_modules": ["model.layers.0.mlp.up_proj"], "layers_to_transform": [0]},
            "lora.layers_to_transform",
            "layer 0 of tiny-llama has none of the targets",
        ),
        ({"rank_pattern": {"z_proj": 4}}, "lora.rank_pattern", "z_proj is the first match of no adapted module"),
        ({"alpha_pattern": {".*": 4, "q_proj": 2}}, "lora.alpha_pattern", "q_proj is the first match of no"),
        ({"rank_pattern": {"(": 4}}, "lora.rank_pattern", "is not a regular expression"),
        ({"exclude_modules": "("}, "lora.exclude_modules", "is not a regular expression"),
        ({"exclude_modules": ".*"}, "lora.target_modules", "matches no module"),
    ],
)
def test_what_would_choose_nothing_is_refused(lora: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(JobInvalid) as caught:
        resolve_modules(lora_of(**lora), spec_of(tiny("llama")))
    assert caught.value.field == field
    assert says in caught.value.message


def test_several_are_named_at_once() -> None:
    with pytest.raises(SeveralInvalid, match=r"(?s)a_proj names no module.*b_proj names no module"):
        resolve_modules(lora_of(target_modules=["a_proj"], exclude_modules=["b_proj"]), spec_of(tiny("llama")))


def test_other_kinds_are_taken_where_the_caller_trains_them() -> None:
    spec: BaseModelSpec = spec_of(tiny("llama"))
    lora = lora_of(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(JobInvalid, match="not a linear map"):
        resolve_modules(lora, spec)
    assert "model.embed_tokens" in resolve_modules(lora, spec, kinds=("linear", "embedding"))

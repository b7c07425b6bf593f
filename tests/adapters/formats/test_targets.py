"""Which modules a config selects, with which rank and scale: PEFT is the oracle, on six architectures."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.patterns import RegexBudget
from loramux_adapters.formats.peft.lora import LoraTuner
from loramux_adapters.formats.peft.name_keys import NameKeys
from loramux_adapters.formats.peft.tuner import Targets
from support.adapters import ARCHITECTURES, make_adapter, peft_warnings_ignored, spec_of, tiny_model

PATIENT = ReadLimits(regex_seconds=10.0)

# GPT-2 has other names: each option is written for both families.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "suffix": ({"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["c_attn"]}),
    "dotted suffix": ({"target_modules": ["mlp.up_proj"]}, {"target_modules": ["mlp.c_proj"]}),
    "full name": (
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
        {"target_modules": ["transformer.h.0.mlp.c_fc"]},
    ),
    "regex": (
        {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)"},
        {"target_modules": r".*\.h\.[01]\.(attn\.c_attn|mlp\.c_fc)$"},
    ),
    "lookahead": ({"target_modules": r"^(?!.*mlp).*_proj"}, {"target_modules": r"(?!.*mlp).*c_proj"}),
    "all-linear": ({"target_modules": "all-linear"}, {"target_modules": "All-Linear"}),
    "all-linear without": (
        {"target_modules": "all-linear", "exclude_modules": ["mlp.gate_proj", "o_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]},
    ),
    "exclude regex": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["c_attn", "c_fc"], "exclude_modules": r".*\.0\..*"},
    ),
    "one layer": (
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
        {"target_modules": ["c_attn", "transformer.h.0.mlp.c_fc"], "layers_to_transform": 1},
    ),
    "layers by pattern": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 7], "layers_pattern": ["layers", "h"]},
    ),
    "every layer": (
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["c_attn"], "layers_to_transform": []},
    ),
    "embedding and head": (
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["wte", "lm_head"]},
    ),
    "layers leave the head out": (
        {"target_modules": ["lm_head", "q_proj", "embed_tokens"], "layers_to_transform": [0]},
        {"target_modules": ["wte", "c_attn"], "layers_to_transform": [0]},
    ),
    "rank patterns": (
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, "^model.layers.1.mlp.up_proj$": 5, r"layers\.0\..*": 2, "s.0.mlp.up_proj": 6},
            "alpha_pattern": {"self_attn.(q|k)_proj": 4, ".*_proj": 2.5},
        },
        {
            "target_modules": "all-linear",
            "rank_pattern": {"c_attn": 3, "^transformer.h.1.mlp.c_fc": 5, r"h\.0\..*": 2, "c_proj|c_fc": 6},
            "alpha_pattern": {"attn.c_(proj|attn)": 4, ".*c_proj": 2.5},
        },
    ),
    "rsLoRA": ({"target_modules": ["k_proj"], "use_rslora": True, "r": 5}, {"target_modules": ["c_fc"], "r": 5}),
}
TIED = {
    "head only": {"target_modules": ["lm_head", "q_proj"]},
    "embedding only": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "neither": {"target_modules": ["q_proj"]},
    "regex": {"target_modules": r"(.*\.)?(lm_head|q_proj)"},
    "head excluded": {"target_modules": ["lm_head", "q_proj"], "exclude_modules": ["lm_head"]},
}


@cache
def tiny(architecture: str, tied: bool) -> PreTrainedModel:
    return tiny_model(architecture, tie_word_embeddings=tied)


def peft_targets(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, tuple[int, float]]:
    with peft_warnings_ignored():
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options))
    return {
        name: (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


def our_targets(model: PreTrainedModel, options: dict[str, Any], limits: ReadLimits = PATIENT) -> Targets:
    return LoraTuner.parse({"peft_type": "LORA"} | options).resolve(spec_of(model), limits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("option", OPTIONS)
def test_selection_is_pefts(architecture: str, option: str) -> None:
    model = tiny(architecture, tied=False)
    options = OPTIONS[option][architecture == "gpt2"]
    ours = our_targets(model, options)
    assert {name: (target.rank({}), target.scale) for name, target in ours.modules.items()} == peft_targets(
        model, options
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("option", TIED)
def test_tying_is_pefts(architecture: str, tied: bool, option: str) -> None:
    model = tiny(architecture, tied=tied)
    options = TIED[option] | {"ensure_weight_tying": True}
    ours = our_targets(model, options)
    assert set(ours.modules) == set(peft_targets(model, options))
    assert (ours.tied_head is not None) == (tied and option != "neither")


def test_a_saved_all_linear_is_read_as_it_was_trained(tmp_path: Path) -> None:
    """PEFT saves the modules it found, and with twenty or more of them the shortest suffixes that tell them apart."""
    model = tiny_model("llama", num_hidden_layers=4)
    directory = make_adapter(model, tmp_path, target_modules="all-linear", r=2)
    saved = json.loads((directory / "adapter_config.json").read_text())["target_modules"]
    assert sorted(saved) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert set(our_targets(model, {"target_modules": saved}).modules) == set(
        our_targets(model, {"target_modules": "all-linear"}).modules
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ["query_key_value"]}, AdapterIncompatible, "selects no module"),
        ({"target_modules": []}, AdapterIncompatible, "selects no module"),
        ({"target_modules": ["input_layernorm"]}, AdapterInvalid, "cannot have an adapter of this kind"),
        ({"target_modules": r".*\.layers\..*"}, AdapterInvalid, "cannot have an adapter of this kind"),
        ({"target_modules": None}, AdapterInvalid, "target_modules: is missing"),
        (
            {"target_modules": ["lm_head"], "ensure_weight_tying": True, "exclude_modules": ["embed_tokens"]},
            AdapterInvalid,
            "exclude both or neither",
        ),
    ],
)
def test_what_cannot_be_selected_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        our_targets(tiny("llama", tied=True), options)


def test_a_rank_per_module_of_a_large_model_fits_the_budget() -> None:
    """AdaLoRA-style configs name every module: 560 keys on 560 modules, in the default budget."""
    linears = [name for name, spec in spec_of(tiny("llama", tied=False)).modules.items() if spec.kind == "linear"]
    in_layer = [name.removeprefix("model.layers.0.") for name in linears if ".0." in name]
    names = [f"model.layers.{layer}.{name}" for layer in range(80) for name in in_layer]
    assert len(names) == 560
    keys = NameKeys(names, "rank_pattern", RegexBudget(ReadLimits()))
    assert all(keys.find(name) == name for name in names)


NAMES = [name for architecture in ("llama", "gpt2") for name, _ in tiny_model(architecture).named_modules() if name]
WORDS = st.sampled_from(
    ["model", "layers", "self_attn", "q_proj", "c_attn", "proj", "mlp", "transformer", "h", "0", "1"]
)
SYNTAX = st.sampled_from([".", ".", "_", "^", "$", "|", ".*", r"\.", "(q|k)", "[qkv]", "x?", r"\d+"])
KEYS = st.lists(WORDS | SYNTAX, min_size=1, max_size=7).map("".join)


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.one_of(KEYS, st.sampled_from(NAMES)), min_size=1, max_size=6, unique=True))
def test_the_first_matching_key_is_pefts(keys: list[str]) -> None:
    try:
        ours = NameKeys(keys, "rank_pattern", RegexBudget(PATIENT))
    except AdapterInvalid:
        return
    for name in NAMES:
        expected = get_pattern_key(keys, name)
        assert ours.find(name) == (expected if expected in keys else None)

"""What we read is what PEFT does: the delta of every module, for every option that changes one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.parts.bias import Bias
from loramux_adapters.parts.low_rank import LowRank
from loramux_adapters.weights import AdapterWeights
from support.adapters import (
    edit_config,
    files_of,
    load_in_peft,
    make_adapter,
    peft_deltas,
    randomize,
    save,
    spec_of,
    tiny_model,
    wrap,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "suffixes": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 3}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\..*(q|up)_proj", "r": 4}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "r": 5, "lora_alpha": 16, "use_rslora": True}),
    "excluded": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layers pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, r"layers\.1\..*k_proj": 6, "v_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3, r".*\.0\.mlp\.down_proj": 0.5},
            "r": 4,
        },
    ),
    "rslora patterns": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 5}}
        | {"use_rslora": True, "r": 2},
    ),
    "negative alpha": ("llama", {"target_modules": ["q_proj"], "lora_alpha": -3}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 4}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica", "r": 4}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True}),
    "conv1d, flag left out": ("gpt2", {"target_modules": ["c_attn"], "r": 4}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte", "c_attn"], "r": 4}),
    "bias all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias lora_only": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "bias on qwen2": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "lora_only without biases": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


def read_directory(directory: Path, model: Any) -> AdapterWeights:
    return read(files_of(directory), spec_of(model), ReadLimits())


def assert_same_deltas(weights: AdapterWeights, deltas: dict[str, torch.Tensor]) -> None:
    low_ranks = {name: module.get(LowRank) for name, module in weights.modules.items() if module.get(LowRank)}
    assert low_ranks.keys() == deltas.keys() == weights.spec.ranks.keys()
    for name, low_rank in low_ranks.items():
        assert low_rank.rank == weights.spec.ranks[name]
        assert deltas[name].abs().max() > 0
        torch.testing.assert_close(low_rank.b @ low_rank.a.float(), deltas[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deltas_are_pefts(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    model = tiny_model(architecture, tie_word_embeddings=False)
    weights = read_directory(make_adapter(model, tmp_path, **options), model)
    assert_same_deltas(weights, peft_deltas(load_in_peft(model, tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    ],
)
def test_biases_are_the_whole_effective_bias(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(architecture)
    weights = read_directory(make_adapter(model, tmp_path, **options), model)
    loaded = load_in_peft(model, tmp_path).get_base_model()
    base = dict(model.named_parameters())
    assert weights.spec.biases
    for name in weights.spec.biases:
        module = loaded.get_submodule(name)
        expected = getattr(module, "base_layer", module).bias
        part = weights.modules[name].get(Bias)
        bias = None if part is None else part.value
        assert bias is not None
        assert torch.equal(bias, expected)
        assert not torch.equal(bias, base[f"{name}.bias"])
    trained = {name.removesuffix(".bias") for name in base if name.endswith(".bias")}
    if options["bias"] == "all":
        assert weights.spec.biases == trained


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_keeps_the_dtype_it_was_uploaded_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama")
    wrapped = wrap(model, target_modules=["q_proj"], r=4, lora_alpha=3).to(dtype)
    weights = read_directory(save(wrapped, tmp_path), model)
    for name, module in weights.modules.items():
        layer = wrapped.get_base_model().get_submodule(name)
        assert module.get(LowRank) is not None
        assert module.get(LowRank).a.dtype == dtype
        assert torch.equal(module.get(LowRank).a, layer.lora_A["default"].weight)
        assert module.get(LowRank).b.dtype == torch.float32
        assert torch.equal(module.get(LowRank).b, layer.lora_B["default"].weight.float() * 0.75)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("architecture", "target"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_fan_in_fan_out_changes_nothing_in_the_file(architecture: str, target: str, flag: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    make_adapter(model, tmp_path, target_modules=[target])
    before = peft_deltas(load_in_peft(model, tmp_path))
    edit_config(tmp_path, fan_in_fan_out=flag)
    assert_same_deltas(read_directory(tmp_path, model), before)
    assert_same_deltas(read_directory(tmp_path, model), peft_deltas(load_in_peft(model, tmp_path)))


@pytest.mark.parametrize("save_embeddings", ["auto", True, False])
def test_saved_copies_of_the_base_are_left_out(save_embeddings: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    wrapped = wrap(model, target_modules=["q_proj"])
    weights = read_directory(save(wrapped, tmp_path, save_embedding_layers=save_embeddings), model)
    assert set(weights.modules) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def test_ensure_weight_tying_carries_both_sides(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    make_adapter(model, tmp_path, target_modules=["lm_head", "q_proj"], r=4, ensure_weight_tying=True)
    weights = read_directory(tmp_path, model)
    assert_same_deltas(weights, peft_deltas(load_in_peft(model, tmp_path)))
    head, embedding = weights.modules["lm_head"].get(LowRank), weights.modules["model.embed_tokens"].get(LowRank)
    assert head is not None
    assert embedding is not None
    torch.testing.assert_close(head.b @ head.a, (embedding.b @ embedding.a).T)


def test_ensure_weight_tying_with_a_regex(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    make_adapter(model, tmp_path, target_modules=r"(.*\.)?(embed_tokens|q_proj)", ensure_weight_tying=True)
    assert_same_deltas(read_directory(tmp_path, model), peft_deltas(load_in_peft(model, tmp_path)))


def test_an_adapter_on_one_side_of_tied_weights_leaves_the_other(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    make_adapter(model, tmp_path, target_modules=["embed_tokens"], r=4)
    assert set(read_directory(tmp_path, model).modules) == {"model.embed_tokens"}


def test_pissa_converted_to_lora_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    wrapped = wrap(model, target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    wrapped.peft_config["default"].init_lora_weights = True
    save(wrapped, tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    randomize(wrapped)
    converted = save(wrapped, tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    weights = read_directory(converted, model)
    assert weights.spec.max_rank == 4
    assert_same_deltas(weights, peft_deltas(load_in_peft(model, converted)))


def test_the_spec_describes_the_adapter(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    make_adapter(model, tmp_path, target_modules=["c_attn"], r=4, bias="lora_only")
    spec = read_directory(tmp_path, model).spec
    assert spec.kind == "lora"
    assert spec.ranks == {"transformer.h.0.attn.c_attn": 4, "transformer.h.1.attn.c_attn": 4}
    assert spec.biases == set(spec.ranks)
    assert (spec.base_fingerprint, spec.base_mismatch) == (None, False)
    assert spec.nbytes == 2 * 4 * (4 * 32 + 96 * 4 + 96)
    assert spec.targets == ("c_attn",)

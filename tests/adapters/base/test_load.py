"""The entry point to a base: its identity is its content, its NF4 bytes never change, foreign formats are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loramux_adapters.base.fingerprint import CONFIG_NOT_ARITHMETIC, fingerprint
from loramux_adapters.base.load import BaseRefused, LoadedBase, load_base, quantized_modules, refingerprint
from loramux_adapters.base.weight_formats import select_weight_formats, supports_packed
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from support.adapters import files_of, peft_warnings_ignored, save, wrap
from support.checkpoints import float_base, make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(wide_model("llama"), tmp_path_factory.mktemp("base") / "float32")


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> LoadedBase:
    return float_base(checkpoint)


def copy_of(
    checkpoint: Path,
    out: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
) -> Path:
    """The checkpoint with some keys of config.json and some tensors changed."""
    out.mkdir()
    settings = json.loads((checkpoint / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps(settings))
    content = load_file(checkpoint / "model.safetensors")
    tensors(content)
    save_file(content, out / "model.safetensors", metadata={"format": "pt"})
    return out


def fingerprint_of(path: Path, dtype: torch.dtype = torch.float32) -> str:
    return load_base(path, compute_dtype=dtype).spec.fingerprint


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32 file", "bfloat16 file"])
def test_the_compute_dtype_is_not_part_of_the_identity(stored: torch.dtype, tmp_path: Path) -> None:
    path = save_checkpoint(wide_model("llama").to(stored), tmp_path / "base")
    loaded = [load_base(path, compute_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert loaded[0].spec == loaded[1].spec
    spelling = "F32" if stored == torch.float32 else "BF16"
    assert {parameter.dtype for parameter in loaded[0].spec.parameters.values()} == {spelling}
    assert loaded[0].model.lm_head.weight.dtype == torch.float32
    assert loaded[1].model.lm_head.weight.dtype == torch.bfloat16


def test_loading_again_gives_the_same_identity(checkpoint: Path, base: LoadedBase, tmp_path: Path) -> None:
    assert fingerprint_of(checkpoint) == base.spec.fingerprint
    assert fingerprint_of(copy_of(checkpoint, tmp_path / "elsewhere")) == base.spec.fingerprint


@pytest.mark.parametrize(
    "name", [Q_PROJ, "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight",
             "lm_head.weight", "model.layers.1.input_layernorm.weight"]
)  # fmt: skip
def test_any_weight_is_part_of_it(checkpoint: Path, base: LoadedBase, tmp_path: Path, name: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[flat.abs().argmax()] *= 1.01

    changed = load_base(copy_of(checkpoint, tmp_path / "changed", tensors=change), compute_dtype=torch.float32)
    assert changed.spec.fingerprint != base.spec.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    ids=["epsilon", "activation", "theta", "scaling"],
)
def test_arithmetic_settings_are_part_of_it(
    checkpoint: Path, base: LoadedBase, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert fingerprint_of(copy_of(checkpoint, tmp_path / "changed", config=change)) != base.spec.fingerprint


def test_names_and_habits_are_not(checkpoint: Path, base: LoadedBase, tmp_path: Path) -> None:
    habits = {
        "eos_token_id": 7,
        "pad_token_id": 3,
        "use_cache": False,
        "_name_or_path": "elsewhere",
        "transformers_version": "4.0.0",
        "attention_dropout": 0.5,
    }
    assert fingerprint_of(copy_of(checkpoint, tmp_path / "changed", config=habits)) == base.spec.fingerprint


def test_every_ignorable_key_is_ignored_and_no_other() -> None:
    plain = fingerprint([], {}, {"hidden_size": 8})
    assert fingerprint([], {}, {"hidden_size": 8} | dict.fromkeys(CONFIG_NOT_ARITHMETIC, "x")) == plain
    assert fingerprint([], {}, {"hidden_size": 8, "sliding_window": None}) == plain
    for key in ("sliding_window", "rope_theta", "attn_logit_softcapping", "num_key_value_heads", "a_new_key"):
        assert fingerprint([], {}, {"hidden_size": 8, key: 4}) != plain


def test_the_order_of_modules_does_not_matter(base: LoadedBase) -> None:
    modules = list(quantized_modules(base.model))
    given = fingerprint(modules[::-1], dict(reversed(base.spec.parameters.items())), base.config_json)
    assert given == base.spec.fingerprint
    assert fingerprint(modules[1:], base.spec.parameters, base.config_json) != given


def test_double_quantization_is_another_base(checkpoint: Path, base: LoadedBase) -> None:
    double = load_base(checkpoint, compute_dtype=torch.float32, double_quant=True)
    assert double.spec.fingerprint != base.spec.fingerprint
    assert refingerprint(double) == double.spec.fingerprint


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_checkpoint_saved_in_nf4_is_the_same_base(
    checkpoint: Path, tmp_path: Path, stored: torch.dtype, double: bool
) -> None:
    plain = save_checkpoint(wide_model("llama").to(stored), tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(
        str(plain),
        dtype="auto",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
        ),
    )
    with peft_warnings_ignored():
        quantized.save_pretrained(str(tmp_path / "nf4"))
    expected = load_base(plain, compute_dtype=torch.bfloat16, double_quant=double)
    loaded = load_base(tmp_path / "nf4", compute_dtype=torch.float32)
    assert loaded.spec.fingerprint == expected.spec.fingerprint
    assert refingerprint(loaded) == expected.spec.fingerprint
    ids = torch.arange(9)[None]
    direct = load_base(plain, compute_dtype=torch.float32, double_quant=double)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, direct.model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_forward_never_repacks_the_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    base = load_base(checkpoint, compute_dtype=dtype)
    before = {name: bytes(module.codes.numpy().data) for name, module in quantized_modules(base.model)}
    assert len(before) == 14
    with torch.no_grad():
        base.model.eval()(torch.arange(40)[None])
    assert {name: bytes(module.codes.numpy().data) for name, module in quantized_modules(base.model)} == before
    assert refingerprint(base) == base.spec.fingerprint


@pytest.mark.skipif(not supports_packed(), reason="bitsandbytes repacks on AVX512-BF16 only")
def test_without_the_switch_a_forward_would_have(checkpoint: Path) -> None:
    base = load_base(checkpoint, compute_dtype=torch.bfloat16)
    base.model.get_submodule(Q_PROJ.removesuffix(".weight")).support_avx512bf16_for_cpu = True
    with torch.no_grad():
        base.model(torch.arange(40)[None])
    with pytest.raises(ValueError, match="repacked"):
        refingerprint(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_serving_never_changes_the_base(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = make_adapter_for(checkpoint, tmp_path / "a", seed=1, r=8, target_modules="all-linear")
    base = load_base(checkpoint, compute_dtype=dtype)
    weight_formats = select_weight_formats(base.device, dtype, dense=dtype == torch.bfloat16, invariant=False)
    engine = ModelEngine(base, {"a": adapter}, weight_formats=weight_formats)
    assert engine.adapted.refingerprint() == base.spec.fingerprint
    for name in ("a", None, "a"):
        engine.submit(name, range(20), 4)
    engine.run()
    assert engine.adapted.refingerprint() == base.spec.fingerprint == float_base(checkpoint).spec.fingerprint


def test_the_model_cannot_be_trained_by_mistake(base: LoadedBase) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "NF4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "NF4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "NF4"),  # bitsandbytes' default is FP4
        ("yes", "quantization_config"),
    ],
    ids=["gptq", "awq", "int8", "fp4", "unsaid", "malformed"],
)
def test_foreign_quantization_is_refused_before_reading_weights(
    checkpoint: Path, tmp_path: Path, declared: object, reason: str
) -> None:
    path = tmp_path / "foreign"
    path.mkdir()
    settings = json.loads((checkpoint / "config.json").read_text()) | {"quantization_config": declared}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BaseRefused, match=reason):
        load_base(path, compute_dtype=torch.float32)


def test_pickled_weights_are_never_read(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    path.mkdir()
    (path / "config.json").write_text((checkpoint / "config.json").read_text())
    torch.save(load_file(checkpoint / "model.safetensors"), path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_base(path, compute_dtype=torch.float32)


def test_the_spec_says_what_can_be_adapted(base: LoadedBase) -> None:
    spec = base.spec
    assert (spec.architecture, spec.num_layers, spec.hidden_size, spec.vocab_size) == ("llama", 2, 128, 320)
    assert (spec.context_length, spec.tied_embeddings) == (256, False)
    assert (spec.embedding, spec.head) == ("model.embed_tokens", "lm_head")
    k_proj = spec.modules["model.layers.1.self_attn.k_proj"]
    assert (k_proj.kind, k_proj.in_features, k_proj.out_features, k_proj.has_bias) == ("linear", 128, 64, False)
    kinds = [module.kind for module in spec.modules.values()]
    assert [kinds.count(kind) for kind in ("linear", "embedding", "norm", "conv1d")] == [15, 1, 5, 0]


def test_conv1d_is_described_as_the_map_it_is(tmp_path: Path) -> None:
    spec = float_base(save_checkpoint(wide_model("gpt2"), tmp_path / "gpt2")).spec
    c_attn = spec.modules["transformer.h.0.attn.c_attn"]
    assert (c_attn.kind, c_attn.in_features, c_attn.out_features, c_attn.has_bias) == ("conv1d", 128, 384, True)
    assert spec.modules["transformer.h.0.ln_1"].kind == "norm"
    assert spec.modules["transformer.h.0.ln_1"].has_bias
    assert spec.tied_embeddings


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32 file", "bfloat16 file"])
def test_a_copy_of_the_tied_head_in_half_precision_is_the_bases_own(stored: torch.dtype, tmp_path: Path) -> None:
    """What PEFT saves beside an adapter on the head, where the base was trained on in float16."""
    model = wide_model("llama", tie_word_embeddings=True).to(stored)
    base = float_base(save_checkpoint(model, tmp_path / "base"))
    adapter = save(wrap(model.half(), target_modules=["lm_head"]), tmp_path / "adapter")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    assert set(read(files_of(adapter), base.spec, ReadLimits()).modules) == {"lm_head"}
    rounded = {name for name, parameter in base.spec.parameters.items() if parameter.rounded}
    assert rounded == {"model.embed_tokens.weight", "lm_head.weight"}

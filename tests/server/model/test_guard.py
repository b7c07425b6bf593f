"""A base that a packed batch would answer wrongly is refused at start with the reason; sound ones pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loramux_adapters.apply.inject import inject
from loramux_adapters.base.load import BaseRefused, LoadedBase, load_base, refingerprint
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.guard.exactness import Truth, ask_untouched
from loramux_adapters.guard.examine import examine
from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.guard.reference import ReferencePacked
from loramux_server.model.attention_metadata import DecodeAttention
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import attend_rows
from loramux_server.model.guard import self_check
from support.against_peft import ask_model, assert_equal_to_peft
from support.checkpoints import float_base, save_checkpoint, wide_model
from support.model_engine import ModelEngine

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + index for index in range(16)],
    "original_max_position_embeddings": 64,
}
PHI3 = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}


def base_of(path: Path, architecture: str, **overrides: Any) -> LoadedBase:
    return float_base(save_checkpoint(wide_model(architecture, **overrides), path / "base"))


def checked(
    base: LoadedBase, context: int, *, blocks: int = 64, block_size: int = 16, tiled: bool = False,
    decode: DecodeAttention = attend_rows,
    distort: Callable[[list[AttentionLayer]], list[AttentionLayer]] = list,
) -> tuple[float, Truth]:  # fmt: skip
    """What the server does at start."""
    examined = examine(base, context)
    layers = examined.layers
    truth = ask_untouched(base, layers, context, room=(blocks - 1) * block_size, block=block_size)
    adapted = inject(base, capacity=8)
    cache = PagedCache(distort(list(layers)), blocks, block_size, base.compute_dtype, base.device)
    return self_check(adapted, cache, truth, rope=examined.rope, decode=decode, tiled=tiled), truth


FOREIGN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 128},
    "gptj": {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 256},
    "falcon": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt_neo": {"hidden_size": 128, "num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4},
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_attention_beside_the_interface_is_refused(architecture: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[architecture](vocab_size=320, **FOREIGN[architecture])
    save_checkpoint(AutoModelForCausalLM.from_config(config), tmp_path / "base")
    with pytest.raises(BaseRefused, match=r"attention interface|states no max_position_embeddings"):
        examine(float_base(tmp_path / "base"), 256)


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = base_of(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(BaseRefused, match=r"'dynamic' depends on the longest sequence.*linear, llama3 or yarn"):
        examine(base, 256)


@pytest.mark.parametrize("tiled", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                       "original_max_position_embeddings": 64}}),
        ("mistral", {"sliding_window": 12}),
        ("mistral", {"sliding_window": 170}),
        ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 2.0}),
        ("gpt2", {}),
        ("phi3", {}),
        ("phi3", PHI3),
    ],
    ids=["llama", "yarn", "window", "far-window", "softcap", "gpt2", "phi3", "longrope"],
)  # fmt: skip
def test_sound_models_pass_their_own_check(
    architecture: str, overrides: dict[str, Any], tiled: bool, tmp_path: Path
) -> None:
    error, truth = checked(base_of(tmp_path, architecture, **overrides), 256, tiled=tiled)
    assert error < 2e-5
    assert truth.far_start > 200


@pytest.mark.parametrize("context", [1, 5, 17, 256, 100_000])
@pytest.mark.parametrize(("blocks", "block_size"), [(4, 16), (3, 1), (3, 256), (5, 256), (3, 1024)])
def test_the_check_fits_any_context_and_memory(context: int, blocks: int, block_size: int, tmp_path: Path) -> None:
    base = base_of(tmp_path, "opt")
    checked(base, min(context, base.spec.context_length), blocks=blocks, block_size=block_size)


@pytest.mark.parametrize("context", [256, 4096])
def test_rounding_in_half_precision_is_no_reason_to_refuse(context: int, tmp_path: Path) -> None:
    """Single rows of a trained model are up to a twelfth off in bfloat16, alone as among batch mates."""
    checkpoint = shutil.copytree(tiny_path(), tmp_path / "base")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    error, _ = checked(load_base(checkpoint, compute_dtype=torch.bfloat16), context, blocks=context // 16 + 40)
    assert error < 0.03


def test_broken_decodes_show_in_half_precision(tmp_path: Path) -> None:
    """They are few beside the rows of prompts, and must not drown in them."""
    base = load_base(save_checkpoint(wide_model("llama"), tmp_path / "base"), compute_dtype=torch.bfloat16)
    with pytest.raises(BaseRefused, match="decoded tokens get other logits than alone"):
        checked(base, 256, decode=lambda *given: attend_rows(*given) * 0)


def test_switches_of_a_training_are_no_reason_to_refuse(tmp_path: Path) -> None:
    base = base_of(tmp_path, "mixtral", output_router_logits=True, output_hidden_states=True, return_dict=False)
    error, _ = checked(base, 256)
    assert error < 2e-5


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    model = wide_model("llama")
    model.get_parameter(name).data[3, 5] = float("nan")
    with pytest.raises(BaseRefused, match=rf"not finite: {name} holds NaN or infinite values"):
        examine(float_base(save_checkpoint(model, tmp_path / "base")), 256)


def test_a_refusal_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    before = base.model.config._attn_implementation
    with pytest.raises(BaseRefused):
        examine(base, 256)
    assert base.model.config._attn_implementation == before


@pytest.mark.parametrize("window", [12, 170])
def test_a_model_whose_window_is_not_kept_does_not_pass(window: int, tmp_path: Path) -> None:
    """170 is beyond the sequences that are computed whole: the positions before it are only in the cache."""
    base = base_of(tmp_path, "mistral", sliding_window=window)
    with pytest.raises(BaseRefused, match=r"packed beside other sequences, .* get other logits than alone"):
        checked(base, 256, distort=lambda layers: [layer._replace(window=None) for layer in layers])


def test_a_window_one_too_wide_does_not_pass(tmp_path: Path) -> None:
    base = base_of(tmp_path, "mistral", sliding_window=12)
    with pytest.raises(BaseRefused, match="get other logits than alone"):
        checked(base, 256, distort=lambda layers: [layer._replace(window=13) for layer in layers])


def test_an_examination_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base = base_of(tmp_path, "gemma2", sliding_window=16, attn_logit_softcapping=2.0)
    before = base.model.config._attn_implementation
    windows = [layer.window for layer in examine(base, 256).layers]
    assert windows == [16 if kind == "sliding_attention" else None for kind in base.config.layer_types]
    assert base.model.config._attn_implementation == before


def test_a_base_in_half_precision_is_examined_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores two percent off would pass for rounding in bfloat16."""
    base = load_base(save_checkpoint(wide_model("llama"), tmp_path / "base"), compute_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in base.model.named_parameters()}
    examine(base, 256)
    assert {name: parameter.dtype for name, parameter in base.model.named_parameters()} == dtypes
    assert refingerprint(base) == base.spec.fingerprint
    sound = ReferencePacked.attend
    monkeypatch.setattr(ReferencePacked, "attend", lambda *a: sound(*a[:5], a[5] * 1.02, a[6]))
    with pytest.raises(BaseRefused, match="get other logits than alone"):
        examine(base, 256)
    monkeypatch.setattr("loramux_adapters.guard.examine.FLOAT32_BYTES", 0)
    examine(base, 256)  # a base too large for copies: only differences beyond rounding show


def test_a_row_of_no_whole_blocks_is_judged_by_the_right_product(tmp_path: Path) -> None:
    """bitsandbytes' own CPU product is wrong there, ours is right: the examination must not take it for the truth."""
    base = base_of(tmp_path, "llama", hidden_size=96, intermediate_size=80, num_attention_heads=4)
    error, _ = checked(base, 256)
    assert error < 2e-5


def phi3_base(path: Path) -> LoadedBase:
    return float_base(path / "base")


@pytest.mark.parametrize("batch_mates", [False, True])
def test_longrope_is_chosen_by_each_request_for_its_whole_length(batch_mates: bool, tmp_path: Path) -> None:
    """Prompts within the original context equal Hugging Face, and so training, whoever runs beside them; one that may
    grow beyond it uses the long factors from its first token on, as one forward of the whole sequence does."""
    base_of(tmp_path, "phi3", **PHI3)
    short, long, growing = list(range(10)), [(n * 7) % 320 for n in range(150)], [(n * 3) % 320 for n in range(62)]
    truths = {}
    for name, prompt in {"short": short, "long": long}.items():
        truths[name] = ask_model(phi3_base(tmp_path).model, prompt)
    engine = ModelEngine(phi3_base(tmp_path), {}, max_batch_tokens=96, max_running=8)
    tickets = {"short": engine.submit(None, short, 8), "growing": engine.submit(None, growing, 8)}
    if batch_mates:
        tickets["long"] = engine.submit(None, long, 8)
    engine.run()
    for name, truth in truths.items():
        if name in tickets:
            assert engine.tokens(tickets[name])[: len(truth.tokens)] == truth.tokens[:8]
    whole = growing + engine.tokens(tickets["growing"])
    with torch.inference_mode():
        expected = phi3_base(tmp_path).model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0, 61:]
    assert float((engine.logits(tickets["growing"]) - expected).abs().max()) < 1e-4


def test_longrope_kv_is_not_shared_between_short_and_long_requests(tmp_path: Path) -> None:
    base_of(tmp_path, "phi3", **PHI3)
    prompt = [(n * 5) % 320 for n in range(48)]
    engine = ModelEngine(phi3_base(tmp_path), {})
    first = engine.submit(None, prompt, 4)
    engine.run()
    second = engine.submit(None, prompt, 60)
    engine.run()
    fresh = ModelEngine(phi3_base(tmp_path), {})
    alone = fresh.submit(None, prompt, 60)
    fresh.run()
    assert engine.tokens(second) == fresh.tokens(alone)
    assert float((engine.logits(first)[0] - engine.logits(second)[0]).abs().max()) > 0.05


def test_longrope_passes_peft_alone(tmp_path: Path) -> None:
    base_of(tmp_path, "phi3", **PHI3)
    truths = [ask_model(phi3_base(tmp_path).model, prompt) for prompt in (list(range(10)), list(range(150)))]
    assert_equal_to_peft(ModelEngine(phi3_base(tmp_path), {}), truths)

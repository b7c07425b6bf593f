"""A base that a packed batch would answer wrongly is refused at start with the reason; longrope is fixed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorica_adapters.apply.inject import inject
from lorica_adapters.base import BaseRefused, LoadedBase
from lorica_adapters.kernels.gathered import GatheredKernels
from lorica_server.model import attention
from lorica_server.model.cache import PagedCache
from lorica_server.model.guard import check_supported, self_check
from lorica_server.model.probe import probe_layers
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


def checked(base: LoadedBase, context: int, *, blocks: int = 64, block_size: int = 16) -> None:
    """What the server does at start."""
    check_supported(base.model, context)
    layers = probe_layers(base)
    adapted = inject(base, GatheredKernels(), capacity=8)
    cache = PagedCache(layers, blocks, block_size, base.compute_dtype, base.device)
    self_check(adapted, cache, context)


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
        check_supported(float_base(tmp_path / "base").model, 256)


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = base_of(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(BaseRefused, match=r"'dynamic' depends on the longest sequence.*linear, llama3 or yarn"):
        check_supported(base.model, 256)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                       "original_max_position_embeddings": 64}}),
        ("mistral", {"sliding_window": 12}),
        ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 2.0}),
        ("gpt2", {}),
        ("phi3", {}),
        ("phi3", PHI3),
    ],
    ids=["llama", "yarn", "window", "softcap", "gpt2", "phi3", "longrope"],
)  # fmt: skip
def test_sound_models_pass_their_own_check(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    checked(base_of(tmp_path, architecture, **overrides), 256)


@pytest.mark.parametrize("context", [1, 5, 17, 256, 100_000])
def test_the_check_fits_any_context_and_memory(context: int, tmp_path: Path) -> None:
    base = base_of(tmp_path, "llama")
    checked(base, min(context, base.spec.context_length), blocks=4)


def test_a_model_whose_window_is_not_kept_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_window(*args: Any, **kwargs: Any) -> Any:
        return attention.paged_attention(*args, **(kwargs | {"sliding_window": None}))

    base = base_of(tmp_path, "mistral", sliding_window=12)
    attention.register()
    probe_layers(base)
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION_NAME, without_window)
    monkeypatch.setattr(attention, "register", lambda: None)
    adapted = inject(base, GatheredKernels(), capacity=8)
    cache = PagedCache(probe_layers(base), 64, 16, base.compute_dtype, base.device)
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION_NAME, without_window)
    with pytest.raises(BaseRefused, match="a packed batch gives other logits than a lone sequence of 256 tokens"):
        self_check(adapted, cache, 256)


def test_a_long_neighbour_does_not_move_a_short_request(tmp_path: Path) -> None:
    base_of(tmp_path, "phi3", **PHI3)
    short, long = list(range(10)), [(place * 7) % 320 for place in range(150)]

    def fresh() -> LoadedBase:
        base = float_base(tmp_path / "base")
        check_supported(base.model, base.spec.context_length)
        return base

    truths = [ask_model(fresh().model, prompt) for prompt in (short, long)]
    assert_equal_to_peft(ModelEngine(fresh(), {}), truths)
    # Left to itself the model answers the short request otherwise in long company.
    naive = ModelEngine(float_base(tmp_path / "base"), {}, prefix_cache=False)
    alone = naive.submit(None, short, 1)
    naive.run()
    beside, _ = (naive.submit(None, prompt, 1) for prompt in (short, long))
    naive.run()
    assert float((naive.logits(alone) - naive.logits(beside)).abs().max()) > 0.1


def test_longrope_within_its_original_context_is_plain_short_rope(tmp_path: Path) -> None:
    base = base_of(tmp_path, "phi3", **PHI3)
    prompt = list(range(10))
    expected = ask_model(base.model, prompt)  # alone and short: the short factors
    served = float_base(tmp_path / "base")
    check_supported(served.model, 64)
    assert_equal_to_peft(ModelEngine(served, {}), [expected])

"""A small random checkpoint of every causal architecture that transformers has, from its own configuration class.

Sizes are cut by the names that configurations share; what an architecture needs beside them stands in `OWN`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
POSITIONS = 512
WINDOW = 24

_SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "n_vocab"),
    128: ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "lru_width", "emb_dim"),
    192: ("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "ffn_hidden_size", "d_ff", "block_ff_dim", "dff"),
    4: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "decoder_layers"),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "n_group"),
    1: ("topk_group", "n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers",
        "num_shared_experts"),
    32: ("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_lora_rank", "kv_channels", "global_head_dim",
         "hidden_size_per_layer_input", "linear_key_head_dim", "linear_value_head_dim", "laurel_rank", "ssm_state_size",
         "mamba_d_head", "mamba_head_dim", "index_head_dim"),
    16: ("qk_rope_head_dim", "rotary_dim", "state_size", "mamba_d_state"),
    48: ("q_lora_rank",),
    64: ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_dim",
         "expert_ffn_hidden_size", "expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    POSITIONS: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
                "original_max_position_embeddings"),
    WINDOW: ("sliding_window", "attention_chunk_size", "attention_window_size", "local_attention", "window_size"),
    8: ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"),
}  # fmt: skip
_ALWAYS = ("head_dim", "num_key_value_heads", "sliding_window")
"""Set wherever an architecture knows them: their defaults are derived from others, or off."""
SMALL = {name: size for size, names in _SIZES.items() for name in names}

_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 32,
}  # fmt: skip
_CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [2]},
    "deepseek_v2": {"topk_method": "greedy", "topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 256},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "position_embedding_type": "nope"},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_dt_rank": 16, "use_mamba_kernels": False},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS | {"num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 2, "chunk_size": 32},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 32,
        "n_groups": 2, "conv_kernel": 4, "chunk_size": 32,
    },
    "olmo_hybrid": _DELTA,
    "phi3": {"original_max_position_embeddings": POSITIONS, "pad_token_id": 0},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 32, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], "adapter_rank": 8,
    },
}  # fmt: skip
"""What the shared names do not say, by architecture."""


def causal_architectures() -> list[str]:
    """The model types transformers maps to a causal language model, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(architecture: str) -> PreTrainedConfig:
    """The architecture's own configuration, cut small; raises what it raises when that is not possible."""
    kind = CONFIG_MAPPING[architecture]
    default = kind()
    text = _text_of(default)
    if text is not default:
        name = next(key for key, value in vars(default).items() if value is text)
        return kind(**{name: _small(type(text), text, OWN.get(architecture, {})).to_dict()})
    return _small(kind, default, OWN.get(architecture, {}))


def save_small(architecture: str, path: Path, seed: int = 0) -> Path:
    """A checkpoint directory of random float32 weights, large enough to make attention matter."""
    config = small_config(architecture)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point():
            spread = 0.6 if "embed" in name else 0.12
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.save_pretrained(path)
    return path


def _text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        return config.get_text_config()
    except ValueError:  # several: none is the decoder of a text
        return config


def _is_set(config: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except AttributeError:  # differs from layer to layer
        return True


def _small(kind: type[PreTrainedConfig], default: PreTrainedConfig, own: dict[str, Any]) -> PreTrainedConfig:
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(default)) | set(type(default).attribute_map)
    if "qk_rope_head_dim" in known:  # latent attention: each head has keys of its own, and rotates a part of them
        own = {"num_key_value_heads": 4, "head_dim": 16} | own
    sizes = {
        name: size for name, size in SMALL.items() if name in known and (name in _ALWAYS or _is_set(default, name))
    }
    if "use_sliding_window" in known:
        sizes["use_sliding_window"] = True
    tokens = {name: 1 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}
    return kind(**sizes | tokens | own)

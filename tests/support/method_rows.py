"""A job for every method and initialization by name, and what has no meaning on an architecture, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Job = Mapping[str, Any]
_TOKENS = list(range(1, 264, 2))


@dataclass(frozen=True)
class Names:
    """What an architecture calls its modules."""

    embedding: str
    queries: str
    keys_and_values: tuple[str, ...]
    out_of_mlp: str
    norm: str


_LLAMA_LIKE = Names("embed_tokens", "q_proj", ("k_proj", "v_proj"), "down_proj", "input_layernorm")
NAMES = {
    "qwen2": _LLAMA_LIKE,  # grouped queries, biases of queries, keys and values, a head of its own
    "gpt2": Names("wte", "c_attn", ("c_attn",), "mlp.c_proj", "ln_1"),  # Conv1D, biases, a tied head
    "llama": _LLAMA_LIKE,  # no biases at all
}


def jobs_of(architecture: str) -> dict[str, Job]:
    """Row -> the sections of its job. A row is left out where the method has no meaning: see REFUSED."""
    names = NAMES[architecture]
    rows = {**_low_rank(names), **_others(names), **_initialized_and_on_the_head(names)}
    if architecture == "llama":
        return {name: rows[name] for name in ("lora", "loha", "lokr")}
    return {name: row for name, row in rows.items() if architecture != "gpt2" or name not in ("loha", "lokr")}


def _low_rank(names: Names) -> dict[str, Job]:
    both_ends = [names.embedding, "lm_head", names.queries]
    pruned = {"init_r": 6, "tinit": 1, "tfinal": 1, "delta_t": 1}
    return {
        "lora": {},
        "rslora": {"method": "rslora"},
        "lora+": {"lora": {"loraplus_lr_ratio": 8}},
        "lora, rank and alpha by pattern": {
            "lora": {"rank_pattern": {names.queries: 2, names.out_of_mlp: 7}, "alpha_pattern": {names.queries: 5}}
        },
        "lora, bias: all": {"lora": {"bias": "all"}},
        "lora, bias: lora_only": {"lora": {"bias": "lora_only", "target_modules": [names.queries]}},
        "lora, trained tokens": {"lora": {"trainable_token_indices": _TOKENS}},
        "lora of one layer": {"lora": {"target_modules": [names.queries], "layers_to_transform": [1]}},
        "lora on head, trained tokens": {
            "lora": {"target_modules": ["lm_head", names.queries], "trainable_token_indices": _TOKENS}
        },
        "lora on embedding": {"lora": {"target_modules": [names.embedding]}},
        "lora on embedding and head": {"lora": {"target_modules": both_ends, "dropout": 0.1}},
        "rslora on embedding and head": {"method": "rslora", "lora": {"target_modules": both_ends}},
        "dora": {"method": "dora"},
        "dora, bias: all": {"method": "dora", "lora": {"bias": "all"}},
        "dora on embedding and head": {"method": "dora", "lora": {"target_modules": both_ends}},
        "adalora": {"method": "adalora", "adalora": pruned},
        "adalora, bias: all": {"method": "adalora", "lora": {"bias": "all"}, "adalora": pruned},
        "vera": {"method": "vera", "lora": {"rank": 24}},
        "loha": {"method": "loha"},
        "lokr": {"method": "lokr"},
    }


def _others(names: Names) -> dict[str, Job]:
    return {
        "ia3": {"method": "ia3"},
        "ia3 on keys, values and the MLP": {
            "method": "ia3",
            "lora": {
                "target_modules": [*names.keys_and_values, names.out_of_mlp],
                "feedforward_modules": [names.out_of_mlp],
            },
        },
        "bitfit": {"method": "bitfit"},
        "bitfit and norms": {"method": "bitfit", "bitfit": {"norms": True}},
        "ln-tuning": {"method": "bitfit", "bitfit": {"biases": False, "norms": True}},
        "prompt": {"method": "prompt", "prompt": {"num_virtual_tokens": 5}},
        "prompt from a text": {
            "method": "prompt",
            "prompt": {"num_virtual_tokens": 7, "prompt_tuning_init_text": "Spell it."},
        },
        "p-tuning": {"method": "p-tuning", "prompt": {"num_virtual_tokens": 4, "encoder_hidden_size": 24}},
        "p-tuning, LSTM": {
            "method": "p-tuning",
            "prompt": {
                "num_virtual_tokens": 4,
                "encoder_reparameterization_type": "LSTM",
                "encoder_hidden_size": 16,
            },
        },
        "prefix": {"method": "prefix", "prompt": {"num_virtual_tokens": 6}},
        "prefix, projected": {
            "method": "prefix",
            "prompt": {"num_virtual_tokens": 6, "prefix_projection": True, "encoder_hidden_size": 16},
        },
        **{
            f"bottleneck, {kind}": {"method": "bottleneck", "bottleneck": {"kind": kind, "reduction_factor": 8}}
            for kind in ("houlsby", "pfeiffer", "parallel")
        },
        "galore": {"method": "galore", "galore": {"rank": 4, "update_proj_gap": 2}},
    }


def _initialized_and_on_the_head(names: Names) -> dict[str, Job]:
    inits = ("B", "gaussian", "orthogonal", "eva", "pissa", "olora", "corda", "lora-ga")
    return {
        **{f"lora, init {init}": {"init": init} for init in inits},
        "lora on head, init lora-ga": {"init": "lora-ga", "lora": {"target_modules": ["lm_head"]}},
        "galore on head": {
            "method": "galore",
            "galore": {"rank": 4, "update_proj_gap": 2},
            "lora": {"target_modules": ["lm_head"]},
        },
        "lora on head, by sophia": {
            "lora": {"target_modules": ["lm_head"]},
            "training": {"optimizer": "sophia", "hessian_update_period": 2, "learning_rate": 1.0},
        },
        "lora, init pissa, bias: lora_only": {
            "init": "pissa",
            "lora": {"bias": "lora_only", "target_modules": [names.queries]},
        },
        "rslora, init pissa": {"method": "rslora", "init": "pissa"},
        "dora, init orthogonal": {"method": "dora", "init": "orthogonal"},
    }


REFUSED: dict[str, tuple[str, Job, str, str]] = {
    "loha of a Conv1D": ("gpt2", {"method": "loha"}, "method", "PEFT has no loha for .*, which is a Conv1D"),
    "lokr of a Conv1D": ("gpt2", {"method": "lokr"}, "method", "PEFT has no lokr for .*, which is a Conv1D"),
    "bitfit without biases": ("llama", {"method": "bitfit"}, "bitfit.biases", "has no biases; train its norms"),
    "norms beside no biases": (
        "llama",
        {"method": "bitfit", "bitfit": {"norms": True}},
        "bitfit.biases",
        "has no biases; train its norms",
    ),
    "bias: all without biases": ("llama", {"lora": {"bias": "all"}}, "lora.bias", "has no biases; remove it"),
    "bias: lora_only where no target has one": (
        "qwen2",
        {"lora": {"bias": "lora_only", "target_modules": ["o_proj"]}},
        "lora.bias",
        "has no biases in the modules that are adapted",
    ),
    "biases of adalora without any": (
        "llama",
        {"method": "adalora", "lora": {"bias": "all"}, "adalora": {"init_r": 6, "tinit": 1, "tfinal": 1}},
        "lora.bias",
        "has no biases",
    ),
    "biases of vera": ("qwen2", {"method": "vera", "lora": {"bias": "all"}}, "lora.bias", "vera does not read it"),
    "ia3 of an embedding": (
        "qwen2",
        {"method": "ia3", "lora": {"target_modules": ["embed_tokens"]}},
        "lora.target_modules",
        "embed_tokens is not a linear map",
    ),
    "lora of a norm": (
        "qwen2",
        {"lora": {"target_modules": ["input_layernorm"]}},
        "lora.target_modules",
        "input_layernorm is neither a linear map nor an embedding",
    ),
    "factors of an embedding": (
        "qwen2",
        {"init": "pissa", "lora": {"target_modules": ["q_proj", "embed_tokens"]}},
        "init",
        "pissa finds no factors for model.embed_tokens, an embedding",
    ),
    "components of an embedding": (
        "gpt2",
        {"init": "eva", "lora": {"target_modules": ["wte"]}},
        "init",
        "eva finds no factors for transformer.wte, an embedding",
    ),
    "dropout of an embedding alone": (
        "gpt2",
        {"lora": {"target_modules": ["wte"], "dropout": 0.1}},
        "lora.dropout",
        "an embedding has none",
    ),
    "magnitudes of a base that would move": (
        "qwen2",
        {"method": "dora", "init": "pissa"},
        "init",
        "cannot go with dora",
    ),
    "an odd rank of init orthogonal": (
        "qwen2",
        {"init": "orthogonal", "lora": {"rank": 3}},
        "lora.rank",
        "3 is odd",
    ),
    "more directions than there are": (
        "qwen2",
        {"init": "olora", "lora": {"rank": 65}},
        "lora.rank",
        "65 is more than",
    ),
    "a token twice adapted": (
        "qwen2",
        {"lora": {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}},
        "method",
        "adapted and trained whole or by tokens at once",
    ),
    "tokens beyond the vocabulary": (
        "qwen2",
        {"lora": {"trainable_token_indices": [320]}},
        "method",
        "are not distinct ids below 320",
    ),
    "factors of a method without": ("qwen2", {"method": "ia3", "init": "pissa"}, "init", "ia3 has no factors"),
}
"""What has no meaning -> architecture, job, the key that says so and why."""

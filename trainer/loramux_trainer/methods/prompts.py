"""Methods that train what stands before the prompt: prompt tuning (Lester et al., 2021) and prefix tuning (Li and
Liang, 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from loramux_adapters.spec import BaseModelSpec
from loramux_trainer.fleet.random import generator
from loramux_trainer.methods.encoders import Lstm, Mlp, Network
from loramux_trainer.methods.method import Beginning, Made, Method, Rule, Start
from loramux_trainer.methods.rules import normal


def prompt(config: Mapping[str, Any], seed: int, rows: torch.Tensor | None = None) -> Method:
    """`rows` [n, hidden]: embeddings to begin with; None: at random, as PEFT does."""
    rule = normal(1.0, "embedding") if rows is None else lambda _: Start(rows.clone(), "embedding")
    return Method({"peft_type": "PROMPT_TUNING", **config}, seed, {"rows": rule})


def p_tuning(
    config: Mapping[str, Any], seed: int, *, hidden: int, encoder: Literal["MLP", "LSTM"] = "MLP", layers: int = 2
) -> Method:
    """Embeddings that a small network makes of trained ones; the file holds what it gives (Liu et al., 2021)."""
    count, width = int(config["num_virtual_tokens"]), int(config["token_dim"])
    network: Network = Lstm(width, hidden, layers) if encoder == "LSTM" else Mlp([width, hidden, hidden, width], F.relu)
    options = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": hidden}
    rule = _encoded(network, (count, width))
    return Method({"peft_type": "P_TUNING", **options, **config}, seed, {"rows": rule})


def projected_prefix(config: Mapping[str, Any], seed: int, *, hidden: int) -> Method:
    """Keys and values that a network of two layers makes (Li and Liang, 2021, section 4.3); exported as it gives
    them."""
    count, width, layers = (int(config[key]) for key in ("num_virtual_tokens", "token_dim", "num_layers"))
    network = Mlp([width, hidden, 2 * layers * width], torch.tanh)
    return Method({"peft_type": "PREFIX_TUNING", **config}, seed, {"rows": _encoded(network, (count, width))})


def _encoded(network: Network, shape: tuple[int, int]) -> Rule:
    def rule(begin: Beginning) -> Made:
        rows = torch.empty(shape).normal_(generator=begin.generator)
        starts = {"embedding": Start(rows, "embedding"), **network.starts(begin.generator)}
        return Made(starts, lambda tensors: network(tensors["embedding"], tensors))

    return rule


def prefix(config: Mapping[str, Any], seed: int) -> Method:
    """Keys and values of every layer, at random."""
    return Method({"peft_type": "PREFIX_TUNING", **config}, seed, {"rows": normal(1.0, "embedding")})


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Ids of tokens to begin from."""
    return torch.randint(0, vocabulary, (count,), generator=generator(seed, "tokens")).tolist()


def repeated(ids: Sequence[int], count: int) -> list[int]:
    """`count` ids: a text's own, again and again where it is shorter, as PEFT does. Raises ValueError for no text."""
    if not ids:
        raise ValueError("prompt.prompt_tuning_init_text has no tokens")
    return [ids[index % len(ids)] for index in range(count)]


def sizes(count: int, base: BaseModelSpec, *, of_keys: bool) -> dict[str, Any]:
    """What a config says of the base; `of_keys`: token_dim is the width of all keys of a layer."""
    heads, width = base.kv_heads or 1, base.kv_width or base.hidden_size
    return {
        "num_virtual_tokens": count,
        "token_dim": heads * width if of_keys else base.hidden_size,
        "num_layers": base.num_layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }

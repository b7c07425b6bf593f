"""How many weights of a base are in 4 bits and how many are not: "an NF4 base" alone would not be true of all.

transformers fuses the experts of a mixture into parameters of three dimensions, which bitsandbytes leaves as they are.
"""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from loramux_adapters.spec import BaseModelSpec, WeightCounts

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def count_weights(spec: BaseModelSpec) -> WeightCounts:
    """By the facts of the base alone: a linear map whose weight is no parameter of the checkpoint is in 4 bits. A tied
    head counts once."""
    linears = [module for module in spec.modules.values() if module.kind in ("linear", "conv1d")]
    nf4 = sum(m.in_features * m.out_features for m in linears if f"{m.name}.weight" not in spec.parameters)
    tied = f"{spec.head}.weight" if spec.tied_embeddings and spec.head != spec.embedding else None
    sizes = {name: math.prod(parameter.shape) for name, parameter in spec.parameters.items() if name != tied}
    experts = sum(size for name, size in sizes.items() if len(spec.parameters[name].shape) == 3)
    return WeightCounts(nf4, sum(sizes.values()), experts)


def is_mixture(config: PretrainedConfig) -> bool:
    """Whether a router sends each token to a few of several experts."""
    text = config.get_text_config()
    found = [getattr(text, key, None) for key in _EXPERT_KEYS]
    return any(isinstance(count, int) and count > 1 for count in found)

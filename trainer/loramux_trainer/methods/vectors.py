"""Methods that train vectors: IA3 (Liu et al., 2022), BitFit (Ben Zaken et al., 2022), LN tuning (Zhao et al.,
2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux_trainer.methods.low_rank import whole_biases
from loramux_trainer.methods.method import Method
from loramux_trainer.methods.rules import BaseValues, constant, of_base


def ia3(config: Mapping[str, Any], seed: int) -> Method:
    """Gains of one."""
    return Method({"peft_type": "IA3", **config}, seed, {"gain": constant(1.0, "vector")})


def layer_norms(config: Mapping[str, Any], seed: int, base: BaseValues) -> Method:
    """Weights and biases of normalizations, from the base's own."""
    rules = {"weight": of_base(base.weight, "vector"), "norm_bias": of_base(base.bias, "vector")}
    return Method({"peft_type": "LN_TUNING", **config}, seed, rules)


def biases(config: Mapping[str, Any], seed: int, base: BaseValues, norms: Sequence[str] = ()) -> Method:
    """Every bias of the base, and the weights of `norms`.

    PEFT has no type for it: it is a LoRA of rank 1 that stays zero, with `bias: all` and the norms as modules_to_save.
    """
    rules = {"a": constant(0.0, None), "b": constant(0.0, None)} | whole_biases(base)
    whole = {"weight": of_base(base.weight, "vector"), "whole_bias": of_base(base.bias, "vector")}
    saved = {"modules_to_save": list(norms)} if norms else {}
    return Method({"peft_type": "LORA", "r": 1, "bias": "all", **saved, **config}, seed, rules | whole)

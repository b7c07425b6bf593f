"""Methods that change linear maps by a few small matrices: LoRA and what grew from it.

LoRA: Hu et al., 2021; rank-stabilized: Kalajdzievski, 2023; DoRA: Liu et al., 2024; VeRA: Kopiczko et al., 2024; LoHa:
Hyeon-Woo et al., 2022; LoKr: Yeh et al., 2024. First values are those of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from loramux_adapters.formats.peft.extras import TokenRowsTarget
from loramux_trainer.fleet.random import generator, kaiming
from loramux_trainer.methods.method import Beginning, Method, Rule, Start
from loramux_trainer.methods.rules import BaseValues, constant, kaiming_uniform, normal, of_base

LoraInit = Literal["A", "B", "gaussian", "orthogonal"]


def lora(config: Mapping[str, Any], seed: int, base: BaseValues, *, init: LoraInit = "A") -> Method:
    """`init` A: A at random and B zero, at an embedding the other way round. B: B at random and A zero. gaussian: A of
    standard deviation 1 / r. orthogonal: both from one orthogonal matrix, which makes their product zero.
    """
    factors: dict[LoraInit, dict[str, Rule]] = {
        "A": {
            "a": _unless_embedding(kaiming_uniform("a"), constant(0.0, "a")),
            "b": _unless_embedding(constant(0.0, "b"), normal(1.0, "b")),
        },
        "B": {"a": constant(0.0, "a"), "b": _kaiming_by_outputs},
        "gaussian": {"a": _gaussian, "b": constant(0.0, "b")},
        "orthogonal": {"a": _orthogonal_a(seed), "b": _orthogonal_b(seed)},
    }
    rules: dict[str, Rule] = factors[init] | {
        "b_bias": constant(0.0, "vector"),
        "magnitude": of_base(base.row_norms, "vector"),
    }
    return Method({"peft_type": "LORA", **config}, seed, rules | whole_biases(base))


def eva(config: Mapping[str, Any], seed: int, base: BaseValues, components: Callable[[str], torch.Tensor]) -> Method:
    """A from the principal components [r, in] of what each module reads; B zero."""
    plain = lora(config, seed, base)
    rules: dict[str, Rule] = {"a": lambda begin: Start(components(begin.module)[: begin.shape[0]], "a")}
    return replace(plain, rules={**plain.rules, **rules})


def vera(config: Mapping[str, Any], seed: int, *, d_initial: float = 0.1) -> Method:
    """Two random matrices that all modules share are drawn once and exported; vectors are trained."""
    rules = {
        "shared_a": kaiming_uniform(None),
        "shared_b": kaiming_uniform(None),
        "lambda_b": constant(0.0, "vector"),
        "lambda_d": constant(d_initial, "vector"),
    }
    return Method({"peft_type": "VERA", "save_projection": True, **config}, seed, rules)


def loha(config: Mapping[str, Any], seed: int) -> Method:
    """The second pair begins at zero."""
    rules = {
        "b1": kaiming_uniform("b"),
        "a1": kaiming_uniform("a"),
        "b2": kaiming_uniform("b"),
        "a2": constant(0.0, "a"),
    }
    return Method({"peft_type": "LOHA", **config}, seed, rules)


def lokr(config: Mapping[str, Any], seed: int) -> Method:
    """The first matrix begins at zero."""
    rules: dict[str, Rule] = {
        "w1": constant(0.0, "matrix"),
        "w1_a": constant(0.0, "b"),
        "w1_b": kaiming_uniform("a"),
        "w2": kaiming_uniform("matrix"),
        "w2_a": kaiming_uniform("b"),
        "w2_b": kaiming_uniform("a"),
    }
    return Method({"peft_type": "LOKR", **config}, seed, rules)


def whole_biases(base: BaseValues) -> dict[str, Rule]:
    """Biases that PEFT's `bias` trains, and rows of tokens, begin as the base's own."""
    return {"bias": of_base(base.bias, "vector"), "token_rows": lambda begin: _token_rows(begin, base)}


def _unless_embedding(rule: Rule, of_embedding: Rule) -> Rule:
    """An embedding's A is a column per token: few of them have gradients in a step, so PEFT lets B be the one at
    random.
    """
    return lambda begin: (of_embedding if begin.spec and begin.spec.kind == "embedding" else rule)(begin)


def _token_rows(begin: Beginning, base: BaseValues) -> Start:
    if not isinstance(begin.target, TokenRowsTarget):
        raise ValueError(f"{begin.module} has no rows of tokens")
    return Start(base.weight(begin.module)[torch.tensor(begin.target.ids)], "embedding")


def _kaiming_by_outputs(begin: Beginning) -> Start:
    """B [out, r] by the rule that draws A, over its outputs."""
    out, rank = begin.shape
    return Start(kaiming((rank, out), begin.generator).T, "b")


def _gaussian(begin: Beginning) -> Start:
    return Start(torch.empty(begin.shape).normal_(0.0, 1.0 / begin.shape[0], generator=begin.generator), "a")


def _orthogonal_rows(seed: int, module: str, rank: int) -> torch.Tensor:
    """[rank, rank], the same for both factors of a module."""
    drawn = torch.randn(rank, rank, generator=generator(seed, f"{module}:orthogonal"))
    rows: torch.Tensor = torch.linalg.qr(drawn)[0]
    return rows


def _orthogonal_a(seed: int) -> Rule:
    """A from the odd rows and B from the even ones of an orthogonal matrix, so that B A is zero at first."""

    def rule(begin: Beginning) -> Start:
        rank, wide = begin.shape
        drawn = torch.randn(wide, rank // 2, generator=begin.generator)
        return Start((drawn @ _orthogonal_rows(seed, begin.module, rank)[0::2]).T / 10.0, "a")

    return rule


def _orthogonal_b(seed: int) -> Rule:
    def rule(begin: Beginning) -> Start:
        out, rank = begin.shape
        drawn = torch.randn(rank // 2, out, generator=begin.generator).T
        return Start(drawn @ _orthogonal_rows(seed, begin.module, rank)[1::2] / 10.0, "b")

    return rule

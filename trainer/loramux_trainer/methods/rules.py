"""How tensors begin: at zero, at one, at random, or as what they replace in the base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import freeze
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats
from loramux_trainer.fleet.parameters import Role
from loramux_trainer.fleet.random import kaiming
from loramux_trainer.methods.method import Rule, Start


def constant(value: float, role: Role | None) -> Rule:
    """The same number everywhere."""
    return lambda begin: Start(torch.full(begin.shape, value), role)


def normal(std: float, role: Role | None, mean: float = 0.0) -> Rule:
    """Gaussian."""
    return lambda begin: Start(torch.empty(begin.shape).normal_(mean, std, generator=begin.generator), role)


def kaiming_uniform(role: Role | None) -> Rule:
    """Uniform in +-1/sqrt(in) over the last dimension, as PEFT draws A."""
    return lambda begin: Start(kaiming(begin.shape, begin.generator), role)


def of_base(value: Callable[[str], torch.Tensor], role: Role) -> Rule:
    """What the base has at the module, so that the model is unchanged at first."""
    return lambda begin: Start(value(begin.module).reshape(begin.shape), role)


class BaseValues:
    """Tensors of the frozen base by module name, float32 copies on the CPU. To be asked of a model nothing is put into,
    or whose modules keep their parameters.
    """

    def __init__(self, base: LoadedBase) -> None:
        self._base = base

    def module(self, name: str) -> nn.Module:
        """The module itself."""
        module: nn.Module = self._base.model.get_submodule(name)
        return module

    def bias(self, name: str) -> torch.Tensor:
        """[out]"""
        return self.module(name).get_parameter("bias").detach().float().cpu()

    def weight(self, name: str) -> torch.Tensor:
        """[out, in] of a linear map, [vocabulary, hidden] of an embedding, [width] of a normalization."""
        module = self.module(name)
        if isinstance(module, Linear4bit) or self._base.spec.modules[name].kind in ("linear", "conv1d"):
            return freeze(module, self._base.compute_dtype, WeightFormats()).dequantize(torch.float32).cpu()
        return module.get_parameter("weight").detach().float().cpu()

    def row_norms(self, name: str) -> torch.Tensor:
        """[out]: lengths of the weight's rows; of an embedding those of its columns, as PEFT measures them."""
        weight = self.weight(name)
        norms: torch.Tensor = torch.linalg.vector_norm(
            weight, dim=0 if self._base.spec.modules[name].kind == "embedding" else 1
        )
        return norms

"""The untouched model with products it can be trusted by: bitsandbytes 0.50 dequantizes wrongly on a CPU where a row is
no whole number of blocks, and the truth an examination compares with must not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loramux_adapters.base.bitsandbytes_compat import Linear4bit
from loramux_adapters.base.frozen import Nf4Linear


@contextmanager
def own_products(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the 4-bit modules of `model` multiply by our own reading of their codes, computed in `dtype`."""
    modules = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in modules:
        module.forward = _product(Nf4Linear.from_module(module, dtype))
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _product(frozen: Nf4Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return frozen.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], frozen.out_features)

    return forward

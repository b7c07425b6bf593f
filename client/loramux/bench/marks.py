"""Names for the compiled kernels in torch's profiler, which sees torch's own operations only.

Marks are put on for a profile and taken off again: a server pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loramux_adapters.kernels.native_linear import NativeLinear
from loramux_adapters.kernels.native_low_rank import NativeKernels
from loramux_adapters.kernels.protocol import LowRankPools
from loramux_server.model.native_decode import NativeDecode

PREFIX = "loramux::"

# Class, method, name, and which of the arguments (the first after self is 0) have shapes worth telling.
_KERNELS: tuple[tuple[type, str, str, tuple[int, ...]], ...] = (
    (NativeLinear, "nf4", "nf4_product", (0, 1)),
    (NativeLinear, "dense", "dense_product", (0, 1)),
    (NativeKernels, "add", "low_rank", (1, 2)),
    (NativeDecode, "__call__", "decode_attention", (2,)),
)


@contextmanager
def marked_kernels() -> Iterator[None]:
    """Every call of a compiled kernel is an event `loramux::<name> <shapes>` of the running profiler."""
    originals = [(cls, method, getattr(cls, method)) for cls, method, _, _ in _KERNELS]
    for cls, method, name, shown in _KERNELS:
        setattr(cls, method, _marked(getattr(cls, method), name, shown))
    try:
        yield
    finally:
        for cls, method, original in originals:
            setattr(cls, method, original)


def split_mark(key: str) -> tuple[str, str]:
    """An event's key as (operation, shapes); the shapes are empty for those of torch."""
    operation, _, shapes = key.partition(" ")
    return (operation, shapes) if key.startswith(PREFIX) else (key, "")


def _marked(kernel: Callable[..., Any], name: str, shown: tuple[int, ...]) -> Callable[..., Any]:
    def marked(self: Any, *arguments: Any) -> Any:
        shapes = " ".join(str(list(_tensor_of(arguments[place]).shape)) for place in shown)
        with torch.profiler.record_function(f"{PREFIX}{name} {shapes}"):
            return kernel(self, *arguments)

    return marked


def _tensor_of(argument: torch.Tensor | LowRankPools) -> torch.Tensor:
    return argument.a if isinstance(argument, LowRankPools) else argument

"""How many rows of a merged adapter are worth a product of their own beside rows that share the frozen one.

Measured once, where it is served: on a CPU it depends on the kernels, on a GPU on its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.base.frozen import DenseLinear, Nf4Linear
from loramux_adapters.base.weight_formats import WeightFormats

_OTHERS = 8
"""Rows that share the frozen product whatever the merged ones do."""
_CANDIDATES = (32, 128, 512)
_WEIGHTS = 1 << 20
"""Of the module that is measured, at least: smaller ones lie in a cache."""
_REPEATS = 2


@torch.inference_mode()
def measure_merged_rows(adapted: AdaptedModel) -> int | None:
    """The least of some numbers of rows at which two products cost less than one; None where they never do.

    Takes milliseconds for small bases, up to some seconds for large ones on a CPU.
    """
    frozen = _measured(adapted)
    if frozen is None:
        return None
    dtype = adapted.base.compute_dtype
    dense = DenseLinear(frozen.dequantize(dtype), None, WeightFormats(native=adapted.weight_formats.native))
    x = torch.zeros(_OTHERS + max(_CANDIDATES), frozen.in_features, dtype=dtype, device=adapted.base.device)
    alone = _seconds(lambda: frozen.forward(x[:_OTHERS]), x.device)
    for rows in _CANDIDATES:
        together = _seconds(lambda count=rows + _OTHERS: frozen.forward(x[:count]), x.device)  # type: ignore[misc]
        apart = _seconds(lambda count=rows: dense.forward(x[:count]), x.device)  # type: ignore[misc]
        if alone + apart < together:
            return rows
    return None


def _measured(adapted: AdaptedModel) -> Nf4Linear | None:
    """The smallest quantized product that is large enough, or the largest of all."""
    products = [group.frozen for group in adapted.groups if isinstance(group.frozen, Nf4Linear)]
    products.sort(key=lambda frozen: frozen.in_features * frozen.out_features)
    large = [frozen for frozen in products if frozen.in_features * frozen.out_features >= _WEIGHTS]
    return large[0] if large else products[-1] if products else None


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, after one that is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])

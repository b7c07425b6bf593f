"""Which implementation of the low-rank arithmetic a server uses; the only place that knows them all."""

from __future__ import annotations

import torch

from loramux_adapters.kernels.gathered import GatheredKernels
from loramux_adapters.kernels.native_low_rank import find_native
from loramux_adapters.kernels.protocol import Kernels
from loramux_adapters.kernels.reference import ReferenceKernels


def select_kernels(*, deterministic: bool, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The reference where a row must not depend on its batch mates, otherwise the fastest there is."""
    if deterministic:
        return ReferenceKernels()
    native = find_native() if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) else None
    return GatheredKernels() if native is None else native

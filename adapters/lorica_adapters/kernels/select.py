"""Which implementation of the low-rank arithmetic a server uses; the only place that knows them all."""

from __future__ import annotations

from lorica_adapters.kernels.gathered import GatheredKernels
from lorica_adapters.kernels.protocol import Kernels
from lorica_adapters.kernels.reference import ReferenceKernels


def select_kernels(*, deterministic: bool) -> Kernels:
    """The reference where a row must not depend on its batch mates, otherwise the fastest."""
    return ReferenceKernels() if deterministic else GatheredKernels()

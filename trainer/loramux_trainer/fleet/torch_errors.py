"""What torch raises for want of memory, and for numbers that are not finite."""

from __future__ import annotations

import torch

NoDecomposition: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""Of a matrix that is not finite."""
_OF_THE_CPU = "DefaultCPUAllocator"  # it has no error of its own


def is_out_of_memory(error: Exception) -> bool:
    """On any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _OF_THE_CPU in str(error)
    )

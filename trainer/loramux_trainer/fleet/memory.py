"""What torch raises for want of memory."""

from __future__ import annotations

import torch

_OF_THE_CPU = "DefaultCPUAllocator"  # it has no error of its own


def is_out_of_memory(error: Exception) -> bool:
    """On any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _OF_THE_CPU in str(error)
    )

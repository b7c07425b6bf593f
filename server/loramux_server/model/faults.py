"""What an exception of torch says of the device: too little memory for this step, or lost for good."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller step may succeed. torch's CPU allocator raises a plain RuntimeError, and so does cuBLAS when it
    finds no workspace."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text)


def is_device_lost(error: BaseException) -> bool:
    """Whether every later call on the device fails too: CUDA faults are sticky, the context is gone.

    torch raises AcceleratorError for them; libraries beside it (bitsandbytes, Triton) a RuntimeError that names the
    CUDA error.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(fault in text for fault in _STICKY)


_STICKY = (
    "CUDA error: an illegal memory access",
    "CUDA error: device-side assert",
    "CUDA error: misaligned address",
    "CUDA error: an illegal instruction",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error",
    "CUDA error: the launch timed out",
)
"""Texts of `cudaGetErrorString` for errors after which the context is unusable (CUDA runtime API, cudaError_t)."""

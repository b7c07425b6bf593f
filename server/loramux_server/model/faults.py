"""What an exception of torch says of the device: too little memory for this step, or lost for good."""

from __future__ import annotations

import logging

import torch

from loramux_adapters.errors import AdapterError
from loramux_server.engine.plan import DeviceLost

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller step may succeed. torch's CPU allocator raises a plain RuntimeError, and so does cuBLAS when it
    finds no workspace; what CUDA allocates beside torch's allocator, as for a kernel loaded at its first call, an
    AcceleratorError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(lack in text for lack in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether every later call on the device fails too: CUDA faults but the want of memory are sticky, the context is
    gone.

    torch raises AcceleratorError for them; libraries beside it (bitsandbytes, Triton) a RuntimeError that names the
    CUDA error.
    """
    if isinstance(error, torch.AcceleratorError):
        return not is_out_of_memory(error)
    text = str(error)
    return isinstance(error, RuntimeError) and any(fault in text for fault in _STICKY)


def explain_background(error: Exception, work: str) -> AdapterError:
    """What those are told whose adapter was worked on between steps, when `error` ended it.

    Raises DeviceLost where no step can follow. Of an error that was not foreseen they are told that it came.
    """
    if isinstance(error, AdapterError):
        return error
    if is_device_lost(error):
        raise DeviceLost(str(error)) from error
    if is_out_of_memory(error):
        logger.warning("%s: out of memory", work)
        return AdapterError(
            "there is not enough device memory for the adapter",
            remedy="lower --kv-bytes, --adapter-device-bytes or --merged-bytes, so that all of them fit",
        )
    logger.error("%s failed", work, exc_info=error)
    return AdapterError("the adapter could not be put on the device; see the server's log")


_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")

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

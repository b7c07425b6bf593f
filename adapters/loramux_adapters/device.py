"""Which device and number format to compute in, and how exactly: asked once, by server and trainer alike."""

from __future__ import annotations

import torch

from loramux_adapters.base.weight_formats import supports_packed

BFLOAT16_CAPABILITY = (8, 0)
"""NVIDIA compute capability from which on bfloat16 is computed by the card (Ampere)."""


class DeviceRefused(Exception):
    """The operator must act: the device asked for cannot be used. Says why and what would do."""


def select_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`, made current for this thread.

    Raises DeviceRefused when it is a GPU that this torch or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        built_for: object = getattr(torch.version, "cuda", None)
        if built_for is None:
            raise DeviceRefused(
                f"torch {torch.__version__} is built without CUDA, so {name} cannot be used: install a CUDA build of "
                "torch (pip install torch without the CPU index) or use --device cpu"
            )
        if not torch.cuda.is_available():
            raise DeviceRefused("torch finds no CUDA device: check nvidia-smi and the driver, or use --device cpu")
        if ":" not in name:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise DeviceRefused(f"{device} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
        compute_exactly()
    use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Makes `device` current for the calling thread; kernels beside torch launch on the current one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def compute_exactly() -> None:
    """Accumulates products in float32 on CUDA: no TF32, no reductions in half precision."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16 on a GPU and float32 on a CPU."""
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
        return torch.bfloat16 if capable else torch.float16
    return torch.bfloat16 if supports_packed() else torch.float32


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceRefused for a format the device would only emulate."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < BFLOAT16_CAPABILITY:
            raise DeviceRefused(
                f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) does not compute in "
                "bfloat16: use --dtype float16 or float32"
            )

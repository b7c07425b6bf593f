"""Which devices an optimizer is for. Torch-free, so that a job is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from loramux_trainer.errors import DeviceInvalid

_CPU_REASONS: Mapping[str, str] = {
    "adamw_8bit": "on a CPU, bitsandbytes expands all of the 8-bit states to float32 at every step",
    "paged_adamw": "there is no memory to page from: on a CPU, bitsandbytes takes an AdamW that is not paged",
    "paged_adamw_8bit": "there is no memory to page from: on a CPU, bitsandbytes takes an AdamW that is not paged",
}


def check_device(optimizer: str, device_type: str) -> None:
    """Raises DeviceInvalid for an optimizer that would not do on this device what it is for."""
    if device_type != "cuda" and optimizer in _CPU_REASONS:
        raise DeviceInvalid(
            "training.optimizer", f"{optimizer} needs a CUDA device ({_CPU_REASONS[optimizer]}); take adamw, or a GPU"
        )

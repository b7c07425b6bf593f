"""What a run needs at the very least, by arithmetic alone: a run that cannot fit is refused before its base is loaded.

It counts what is there for certain: the base's NF4 codes and scales, its embedding, and two float32 numbers for each
weight of a low rank. Libraries, activations, optimizer states and whatever a device sets aside come on top, so nothing
that would fit is refused; `loramux train --plan` measures all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loramux_adapters.base.outline import BaseOutline
from loramux_adapters.memory import free_bytes
from loramux_trainer.errors import JobInvalid
from loramux_trainer.job import TrainConfig
from loramux_trainer.schema.effect import LOW_RANK
from loramux_trainer.targets import modules_of

_NF4 = 0.5 + 4 / 64  # bytes of a weight: its code, and a float32 scale for 64
_NF4_NESTED = 0.5 + 1 / 64  # the scales in 8 bits
_TRAINED = 8  # bytes of a trained number: itself and its gradient


def check_memory(jobs: Sequence[TrainConfig], base: BaseOutline, device: torch.device, dtype: torch.dtype) -> None:
    """Of jobs that train at once. Raises JobInvalid where the device has less left than they need at the least."""
    held, trained = base_bytes(base, dtype, nested=jobs[0].training.double_quant), sum(map(_trained(base), jobs))
    free = free_bytes(device)
    if held + trained <= free:
        return
    lower = "model: choose a smaller one" if held > free else _lower(jobs)
    raise JobInvalid(
        "model" if held > free else "lora.rank",
        f"the base takes {held / 1e9:.2f} GB and what is trained {trained / 1e9:.2f} GB at the least, and "
        f"{device.type} has {free / 1e9:.2f} GB free",
        remedy=f"{lower}; loramux train --plan says what the whole run needs",
    )


def base_bytes(base: BaseOutline, dtype: torch.dtype, *, nested: bool) -> int:
    """Of its NF4 modules and its embedding, as loaded with the compute dtype `dtype`."""
    total = 0.0
    for name, module in base.modules.items():
        weights = module.in_features * module.out_features
        if module.kind == "embedding":
            total += weights * dtype.itemsize
        elif module.kind in ("linear", "conv1d") and name != base.head:
            total += weights * (_NF4_NESTED if nested else _NF4)
    return int(total)


def _trained(base: BaseOutline) -> Callable[[TrainConfig], int]:
    def of(job: TrainConfig) -> int:
        if job.method not in LOW_RANK:
            return 0
        shapes = modules_of(job, base)
        sizes = [(base.modules[name], shape.rank) for name, shape in shapes.items()]
        return sum(rank * (module.in_features + module.out_features) for module, rank in sizes) * _TRAINED

    return of


def _lower(jobs: Sequence[TrainConfig]) -> str:
    return "lower lora.rank" if len(jobs) == 1 else "lower lora.rank or fleet.max_members"

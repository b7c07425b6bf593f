"""Random first values: each tensor from the seed and its own name, so that no other tensor moves it."""

from __future__ import annotations

import hashlib
import math

import torch

from loramux_adapters.formats.peft.tuner import Shape


def generator(seed: int, name: str) -> torch.Generator:
    """On the CPU: the same numbers whatever the device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def kaiming(shape: Shape, source: torch.Generator) -> torch.Tensor:
    """[rank, in] uniform in +-1/sqrt(in): kaiming uniform for leaky slope sqrt(5) (He et al., 2015)."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=source)

"""Random numbers of one thing: drawn from a seed and the thing's own name, so that no other moves them."""

from __future__ import annotations

import hashlib
import math

import torch

from loramux_adapters.formats.peft.tuner import Shape


def generator(seed: int | str, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """On the CPU it draws the same numbers on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def kaiming(shape: Shape, source: torch.Generator) -> torch.Tensor:
    """[rank, in] uniform in +-1/sqrt(in): kaiming uniform for leaky slope sqrt(5) (He et al., 2015)."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=source)

"""Orthogonal blocks, of the methods that rotate what a module reads (OFT, BOFT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import AdapterIncompatible
from loramux_adapters.formats.refusals import quote
from loramux_adapters.parts.dense import WeightChange

MAX_BLOCK = 2048
"""The widest block: making one takes a time that grows with the cube of it, applying one with its width."""


@dataclass(frozen=True, eq=False)
class RotateInputs(WeightChange):
    """W R' for a block-diagonal R: the module reads x R in place of x.

    Takes out * in * b products for blocks b wide, and two copies of W.
    """

    blocks: torch.Tensor  # [in / b, b, b], or [1, b, b] that all share; float32

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """See WeightChange."""
        return rotate_columns(weight, self.blocks)


def rotate_columns(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """W [out, in] R', a new tensor, for R of diagonal `blocks` [in / b, b, b] or [1, b, b]."""
    out, wide = weight.shape
    b = blocks.shape[-1]
    by_block = weight.view(out, wide // b, b).transpose(0, 1)
    return (by_block @ blocks.transpose(1, 2)).transpose(0, 1).reshape(out, wide)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - S)(I + S)^-1 for skew-symmetric S [n, b, b]: an orthogonal matrix each."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    rotations: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return rotations


def cayley_work(count: int, width: int) -> int:
    """Multiply-adds that `cayley` takes of so many blocks; of small ones most of the time is not in their products."""
    return count * (3 * width**3 + 1_200 * width**2)


def series_work(count: int, width: int, terms: int) -> int:
    """Multiply-adds of so many powers of so many blocks, with the sums."""
    return terms * count * (width**3 + 200 * width**2)


def check_block(width: int, key: str, module: str) -> None:
    """Raises AdapterIncompatible for a block that is wider than MAX_BLOCK."""
    if width > MAX_BLOCK:
        raise AdapterIncompatible(
            f"{CONFIG_FILE}: {key} makes blocks of {width} inputs of {quote(module)}, this server takes at most "
            f"{MAX_BLOCK}",
            subject=f"{CONFIG_FILE}: {key}",
            remedy="train with smaller blocks",
        )

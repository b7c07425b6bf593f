"""The paged KV memory of the device, one pair of tensors per attention layer.

Which block belongs to whom is decided by `engine.blocks`; here is only where a (block, offset) lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class LayerShape(NamedTuple):
    """KV heads and head width of one attention layer, for keys and values (some models differ)."""

    heads: int
    key_width: int
    value_width: int


class PagedCache:
    """Keys and values [blocks, block_size, heads, width] per layer; zero at first, since 0 * NaN is NaN."""

    def __init__(
        self, layers: Sequence[LayerShape], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.blocks = block_size, blocks
        self.keys = [torch.zeros(blocks, block_size, s.heads, s.key_width, dtype=dtype, device=device) for s in layers]
        self.values = [
            torch.zeros(blocks, block_size, s.heads, s.value_width, dtype=dtype, device=device) for s in layers
        ]

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [T, heads, width] at flat rows [T] (block * block_size + offset)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, rows, key)
        self.values[layer].flatten(0, 1).index_copy_(0, rows, value)

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers blocks [..., n] into keys and values [..., n * block_size, heads, width]."""
        keys, values = self.keys[layer], self.values[layer]
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        flat = blocks.reshape(-1)
        return (
            keys.index_select(0, flat).view(*shape, *keys.shape[2:]),
            values.index_select(0, flat).view(*shape, *values.shape[2:]),
        )

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks in every layer: a NaN that a failed request left would reach the next owner as 0 * NaN."""
        if blocks:
            ids = torch.tensor(blocks, device=self.keys[0].device)
            for tensor in (*self.keys, *self.values):
                tensor.index_fill_(0, ids, 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in every layer."""
        if not pairs:
            return
        source = torch.tensor([pair[0] for pair in pairs], device=self.keys[0].device)
        target = torch.tensor([pair[1] for pair in pairs], device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, target, tensor.index_select(0, source))


def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    return sum(shape.heads * (shape.key_width + shape.value_width) for shape in layers) * dtype.itemsize

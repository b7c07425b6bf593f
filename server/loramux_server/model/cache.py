"""The paged KV memory of the device, one pair of tensors per attention layer.

Which block belongs to whom is decided by `engine.blocks`; here is only where a (block, offset) lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.guard.layers import AttentionLayer


class PagedCache:
    """Keys and values [blocks, heads, block_size, width] per layer. A block given to another keeps what it held until
    it is overwritten: attention has to read no further than its own request's tokens.

    Heads before positions: what a gather of blocks by head gives is what a batched product reads, without a copy.
    """

    def __init__(
        self, layers: Sequence[AttentionLayer], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.blocks, self.layers = block_size, blocks, tuple(layers)
        self.keys = [torch.zeros(blocks, s.heads, block_size, s.key_width, dtype=dtype, device=device) for s in layers]
        self.values = [
            torch.zeros(blocks, s.heads, block_size, s.value_width, dtype=dtype, device=device) for s in layers
        ]

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [heads, T, width] at `rows` [heads * T], see `write_rows`."""
        self.keys[layer].view(-1, key.shape[-1]).index_copy_(0, rows, key.reshape(-1, key.shape[-1]))
        self.values[layer].view(-1, value.shape[-1]).index_copy_(0, rows, value.reshape(-1, value.shape[-1]))

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers `read_blocks` [..., heads, n] into keys and values [..., heads, n * block_size, width]."""
        keys, values, flat = self.keys[layer], self.values[layer], blocks.reshape(-1)
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        return (
            keys.flatten(0, 1).index_select(0, flat).view(*shape, keys.shape[-1]),
            values.flatten(0, 1).index_select(0, flat).view(*shape, values.shape[-1]),
        )

    def write_rows(self, slot_mapping: torch.Tensor, heads: int) -> torch.Tensor:
        """Where tokens at `slot_mapping` [T] (block * block_size + offset) lie for each head: [heads * T]."""
        head = torch.arange(heads, device=slot_mapping.device)[:, None]
        block = slot_mapping // self.block_size
        return ((block * heads + head) * self.block_size + slot_mapping % self.block_size).reshape(-1)

    def read_blocks(self, blocks: torch.Tensor, heads: int) -> torch.Tensor:
        """The (block, head) pairs of `blocks` [..., n] -> [..., heads, n]."""
        return blocks[..., None, :] * heads + torch.arange(heads, device=blocks.device)[:, None]


def bytes_per_token(layers: Sequence[AttentionLayer], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    return sum(shape.heads * (shape.key_width + shape.value_width) for shape in layers) * dtype.itemsize

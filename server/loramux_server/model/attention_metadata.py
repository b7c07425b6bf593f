"""What the attention of one step needs, handed through the model's keyword arguments.

Rows and blocks of a step, cut into prefills (several rows of one request) and decode rows (one row each). Knows no
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from loramux_server.model.cache import PagedCache


class AttentionParams(NamedTuple):
    """How one layer attends: scores times `scale`, at most `window` positions back, capped by tanh at `softcap`."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class PrefillSegment:
    """Rows [first, last) of the step are positions start .. of one request; `blocks` [n] covers them and all before."""

    def __init__(self, first: int, last: int, start: int, blocks: torch.Tensor) -> None:
        self.first, self.last, self.start, self.blocks = first, last, start, blocks
        self._gathers: dict[int, torch.Tensor] = {}

    @property
    def length(self) -> int:
        """Positions attended to by the last row."""
        return self.start + self.last - self.first

    def gather(self, cache: PagedCache, heads: int) -> torch.Tensor:
        """`cache.read_blocks` of all blocks, made once per step."""
        if heads not in self._gathers:
            self._gathers[heads] = cache.read_blocks(self.blocks, heads)
        return self._gathers[heads]


class DecodeBatch:
    """Rows of one token each, of similar context length, attended together.

    `rows` [B]: which rows of the step they are, None for all of them in order; `blocks` [B, n], padded with any valid
    block; `positions` [B]. Integers are int64.
    """

    def __init__(self, rows: torch.Tensor | None, blocks: torch.Tensor, positions: torch.Tensor) -> None:
        self.rows, self.blocks, self.positions = rows, blocks, positions
        self._gathers: dict[int, torch.Tensor] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    def gather(self, cache: PagedCache, heads: int) -> torch.Tensor:
        """`cache.read_blocks` of all blocks, made once per step."""
        if heads not in self._gathers:
            self._gathers[heads] = cache.read_blocks(self.blocks, heads)
        return self._gathers[heads]

    def mask(self, length: int, window: int | None) -> torch.Tensor:
        """[B, length]: True at positions a row must not see; made once per step and window."""
        if window not in self._masks:
            place = torch.arange(length, device=self.positions.device)[None, :]
            mask = place > self.positions[:, None]
            if window is not None:
                mask |= place <= self.positions[:, None] - window
            self._masks[window] = mask
        return self._masks[window]


class DecodeAttention(Protocol):
    """One implementation of attention for decode rows; chosen once, at start."""

    def __call__(
        self, cache: PagedCache, layer: int, query: torch.Tensor, rows: DecodeBatch, params: AttentionParams
    ) -> torch.Tensor:
        """query [B, H, D] -> [B, H, Dv]. What a row may not see has no influence on it, whatever it holds."""
        ...


ReplaceKv = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Layer, key and value [heads, T, width] of the step's tokens -> those to be written."""


class AttentionMetadata:
    """One step. `places` [T]: where its tokens go in the cache, block * block_size + offset."""

    def __init__(
        self,
        cache: PagedCache,
        slot_mapping: torch.Tensor,
        decode: DecodeAttention,
        prefills: Sequence[PrefillSegment] = (),
        decodes: Sequence[DecodeBatch] = (),
        *,
        tiled: bool = False,
    ) -> None:
        self.cache, self.slot_mapping, self.decode = cache, slot_mapping, decode
        self.prefills, self.decodes, self.tiled = prefills, decodes, tiled
        self.replace: ReplaceKv | None = None
        self._write_rows: dict[int, torch.Tensor] = {}

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [heads, T, width] of this step's tokens."""
        if self.replace is not None:
            key, value = self.replace(layer, key, value)
        heads = key.shape[0]
        if heads not in self._write_rows:
            self._write_rows[heads] = self.cache.write_rows(self.slot_mapping, heads)
        self.cache.write(layer, self._write_rows[heads], key, value)

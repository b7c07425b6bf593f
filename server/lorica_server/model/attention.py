"""Attention over the paged cache for unmodified Hugging Face models, registered as an attention function.

Every row attends to the positions of its own request up to itself. Two forms: a fast one, and a tiled one whose result
for a row does not depend on batch mates, chunking or cache hits. Knows rows and blocks, not requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from lorica_server.model.cache import LayerShape, PagedCache

ATTENTION_NAME = "lorica_paged"

KV_TILE = 64
QUERY_TILE = 16
"""Positions (in whole blocks, at least one) and query rows per tile of the tiled form: every product has one shape."""


class Span:
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


class DecodeRows:
    """Rows of one token each, of similar context length, attended together.

    `rows` [B]: which rows of the step they are, None for all of them in order; `blocks` [B, n], padded with any valid
    block; `positions` [B].
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
        """[B, 1, 1, length]: True at positions a row must not see; made once per step and window."""
        if window not in self._masks:
            place = torch.arange(length, device=self.positions.device)[None, :]
            hidden = place > self.positions[:, None]
            if window is not None:
                hidden |= place <= self.positions[:, None] - window
            self._masks[window] = hidden[:, None, None, :]
        return self._masks[window]


class PagedContext:
    """What the attention of one step needs; handed through the model's keyword arguments.

    `places` [T]: where this step's tokens go in the cache, block * block_size + offset.
    """

    def __init__(
        self,
        cache: PagedCache,
        places: torch.Tensor,
        spans: Sequence[Span] = (),
        decodes: Sequence[DecodeRows] = (),
        *,
        tiled: bool = False,
    ) -> None:
        self.cache, self.places, self.spans, self.decodes, self.tiled = cache, places, spans, decodes, tiled
        self._write_rows: dict[int, torch.Tensor] = {}

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [heads, T, width] of this step's tokens."""
        heads = key.shape[0]
        if heads not in self._write_rows:
            self._write_rows[heads] = self.cache.write_rows(self.places, heads)
        self.cache.write(layer, self._write_rows[heads], key, value)


@dataclass(eq=False)
class ShapeProbe:
    """Stands in for a PagedContext to learn each layer's KV shape from one forward."""

    layers: dict[int, LayerShape] = field(default_factory=dict)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]
    value: torch.Tensor,  # [1, KV, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    ctx: PagedContext | ShapeProbe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Writes this step's keys and values to the cache and attends; returns ([1, T, H, Dv], None)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if isinstance(ctx, ShapeProbe):
        ctx.layers[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return torch.zeros_like(value).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None
    ctx.write(layer, key[0], value[0])
    rows = query[0].transpose(0, 1)  # [T, H, D]
    limits = (scale, sliding_window, softcap)
    only = ctx.decodes[0] if len(ctx.decodes) == 1 and not ctx.spans else None
    if only is not None and only.rows is None:
        return _decode(ctx.cache, layer, rows, only, *limits)[None], None
    out = rows.new_zeros(rows.shape[0], rows.shape[1], value.shape[3])
    for decode in ctx.decodes:
        picked = rows if decode.rows is None else rows[decode.rows]
        attended = _decode(ctx.cache, layer, picked, decode, *limits)
        if decode.rows is None:
            out.copy_(attended)
        else:
            out[decode.rows] = attended
    for span in ctx.spans:
        attend = _tiled if ctx.tiled else _span
        out[span.first : span.last] = attend(ctx.cache, layer, rows[span.first : span.last], span, *limits)
    return out[None], None


def _decode(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [B, H, D]
    decode: DecodeRows,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One query row per request over its gathered blocks -> [B, H, Dv]."""
    kv_heads = cache.layers[layer].heads
    keys, values = cache.read(layer, decode.gather(cache, kv_heads))  # [B, KV, L, D]
    batch, _, length, _ = keys.shape
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # [B, KV, G, D]
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float().mul_(scale)  # [B, KV, G, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # Filled in, not added: keys that a former owner left may be so large that a score is inf, and inf - inf is NaN.
    scores.masked_fill_(decode.mask(length, window), float("-inf"))
    probabilities = scores.softmax(-1).to(values.dtype)
    return torch.matmul(probabilities, values).reshape(batch, query.shape[1], -1)


def _span(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [n, H, D]
    span: Span,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """A chunk of one request over everything before and in it -> [n, H, Dv]."""
    if softcap is not None:
        return _tiled(cache, layer, query, span, scale, window, softcap)
    keys, values = cache.read(layer, span.gather(cache, cache.layers[layer].heads))  # [KV, L, D]
    keys, values = keys[:, : span.length], values[:, : span.length]
    causal = span.start == 0 and (window is None or window >= span.length)
    mask = None
    if not causal:
        hidden = _hidden(span.start, query.shape[0], 0, span.length, window, query.device)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _tiled(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [n, H, D]
    span: Span,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Online softmax over fixed tiles of queries and KV, in float32: [n, H, Dv].

    Every product has one shape, and a tile wholly behind a row changes nothing in it: a row's result is the same,
    bit for bit, in whatever chunk it is computed. (Milakov and Gimelshein, Online normalizer calculation, 2018.)
    """
    rows = query.shape[0]
    padded = F.pad(query.float(), (0, 0, 0, 0, 0, -rows % QUERY_TILE))
    tiles = [
        _tile(cache, layer, padded[first : first + QUERY_TILE], span, span.start + first, scale, window, softcap)
        for first in range(0, rows, QUERY_TILE)
    ]
    return torch.cat(tiles)[:rows].to(query.dtype)


def _tile(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [QUERY_TILE, H, D] float32
    span: Span,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Rows at positions start .. -> [QUERY_TILE, H, Dv]."""
    kv_heads, device = cache.layers[layer].heads, query.device
    # [KV, QUERY_TILE * G, D]
    grouped = query.view(QUERY_TILE, kv_heads, -1, query.shape[-1]).transpose(0, 1).flatten(1, 2).contiguous()
    group = grouped.shape[1] // QUERY_TILE
    best = torch.full((kv_heads, QUERY_TILE * group, 1), float("-inf"), device=device)
    total = torch.zeros_like(best)
    out = torch.zeros(kv_heads, QUERY_TILE * group, cache.layers[layer].value_width, device=device)
    per_tile = max(1, KV_TILE // cache.block_size)
    positions = per_tile * cache.block_size
    for first in range(0, min(start + QUERY_TILE, span.length), positions):
        begin = first // cache.block_size
        blocks = span.blocks[begin : begin + per_tile]
        blocks = F.pad(blocks, (0, per_tile - blocks.shape[0]), value=int(blocks[0]))
        keys, values = cache.read(layer, cache.read_blocks(blocks, kv_heads))  # [KV, positions, D]
        scores = torch.bmm(grouped, keys.float().transpose(1, 2).contiguous()) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = _hidden(start, QUERY_TILE, first, positions, window, device).repeat_interleave(group, 0)
        scores = scores.masked_fill(hidden, float("-inf"))
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        shift = torch.where(new_best.isinf(), torch.zeros_like(new_best), new_best)
        weights = torch.exp(scores - shift)
        decay = torch.exp(torch.where(best.isinf(), best, best - shift))
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + torch.bmm(weights, values.float())
        best = new_best
    # A padding row behind a window may have seen nothing: its 0 / 0 is dropped by the caller.
    return (out / total).view(kv_heads, QUERY_TILE, group, -1).transpose(0, 1).flatten(1, 2)


def _hidden(start: int, rows: int, first: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[rows, length]: True where the query at position start + i must not see position first + j."""
    query = torch.arange(start, start + rows, device=device)[:, None]
    place = torch.arange(first, first + length, device=device)[None, :]
    hidden = place > query
    return hidden if window is None else hidden | (place <= query - window)


def register() -> None:
    """Makes `ATTENTION_NAME` known to transformers. No mask function is registered, so no mask is built."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)

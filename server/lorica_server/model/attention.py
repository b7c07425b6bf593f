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
"""Positions and query rows per tile of the tiled form: every product has the same shape. KV_TILE is a multiple of the
block size."""


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [first, last) of the step are positions start .. of one request; `blocks` covers them and all before."""

    first: int
    last: int
    start: int
    blocks: torch.Tensor  # [n] int64

    @property
    def length(self) -> int:
        """Positions attended to by the last row."""
        return self.start + self.last - self.first


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """Rows of one token each, of similar context length, attended together."""

    rows: torch.Tensor | None  # [B] int64; None: all rows of the step in order
    blocks: torch.Tensor  # [B, n] int64, padded with any valid block
    positions: torch.Tensor  # [B] int64


@dataclass(eq=False)
class PagedContext:
    """What the attention of one step needs; handed through the model's keyword arguments."""

    cache: PagedCache
    write_rows: torch.Tensor  # [T] int64, flat cache rows of this step's tokens
    spans: Sequence[Span] = ()
    decodes: Sequence[DecodeRows] = ()
    tiled: bool = False


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
    key_rows, value_rows = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, KV, D]
    ctx.cache.write(layer, ctx.write_rows, key_rows, value_rows)
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
    keys, values = cache.read(layer, decode.blocks)  # [B, L, KV, D]
    batch, length, kv_heads, _ = keys.shape
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # [B, KV, G, D]
    scores = torch.matmul(grouped, keys.permute(0, 2, 3, 1)).float().mul_(scale)  # [B, KV, G, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(length, device=query.device)
    hidden = place[None, :] > decode.positions[:, None]
    if window is not None:
        hidden |= place[None, :] <= decode.positions[:, None] - window
    scores.masked_fill_(hidden[:, None, None, :], float("-inf"))
    probabilities = scores.softmax(-1).to(values.dtype)
    return torch.matmul(probabilities, values.transpose(1, 2)).reshape(batch, query.shape[1], -1)


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
    keys, values = cache.read(layer, span.blocks)
    keys, values = keys[: span.length], values[: span.length]
    causal = span.start == 0 and (window is None or window >= span.length)
    mask = None
    if not causal:
        hidden = _hidden(span.start, query.shape[0], 0, span.length, window, query.device)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
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
    kv_heads, device = cache.keys[layer].shape[2], query.device
    # [KV, QUERY_TILE * G, D]
    grouped = query.view(QUERY_TILE, kv_heads, -1, query.shape[-1]).transpose(0, 1).flatten(1, 2).contiguous()
    group = grouped.shape[1] // QUERY_TILE
    best = torch.full((kv_heads, QUERY_TILE * group, 1), float("-inf"), device=device)
    total = torch.zeros_like(best)
    out = torch.zeros(kv_heads, QUERY_TILE * group, cache.values[layer].shape[3], device=device)
    per_tile = KV_TILE // cache.block_size
    for first in range(0, min(start + QUERY_TILE, span.length), KV_TILE):
        begin = first // cache.block_size
        blocks = span.blocks[begin : begin + per_tile]
        blocks = F.pad(blocks, (0, per_tile - blocks.shape[0]), value=int(blocks[0]))
        keys, values = cache.read(layer, blocks)  # [KV_TILE, KV, D]
        scores = torch.bmm(grouped, keys.float().permute(1, 2, 0).contiguous()) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = _hidden(start, QUERY_TILE, first, KV_TILE, window, device).repeat_interleave(group, 0)
        scores = scores.masked_fill(hidden, float("-inf"))
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        shift = torch.where(new_best.isinf(), torch.zeros_like(new_best), new_best)
        weights = torch.exp(scores - shift)
        decay = torch.exp(torch.where(best.isinf(), best, best - shift))
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + torch.bmm(weights, values.float().transpose(0, 1).contiguous())
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

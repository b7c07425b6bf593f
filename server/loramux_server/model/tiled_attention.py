"""The tiled form of attention: a row's result does not depend on batch mates, chunking or cache hits, bit for bit.

Slower than the fast form, and exact by construction: every product has one shape. Also serves where the fast form has
no soft cap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loramux_server.model.attention_metadata import AttentionParams, PrefillSegment
from loramux_server.model.cache import PagedCache

KV_TILE = 64
QUERY_TILE = 16
"""Positions (in whole blocks, at least one) and query rows per tile."""


def attend_tiled(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [n, H, D]
    segment: PrefillSegment,
    params: AttentionParams,
) -> torch.Tensor:
    """Online softmax over fixed tiles of queries and KV, in float32: [n, H, Dv].

    Every product has one shape, and a tile wholly behind a row changes nothing in it: a row's result is the same,
    bit for bit, in whatever chunk it is computed. (Milakov and Gimelshein, Online normalizer calculation, 2018.)
    """
    rows = query.shape[0]
    padded = F.pad(query.float(), (0, 0, 0, 0, 0, -rows % QUERY_TILE))
    tiles = [
        _tile(cache, layer, padded[first : first + QUERY_TILE], segment, segment.start + first, params)
        for first in range(0, rows, QUERY_TILE)
    ]
    return torch.cat(tiles)[:rows].to(query.dtype)


def _tile(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [QUERY_TILE, H, D] float32
    segment: PrefillSegment,
    start: int,
    params: AttentionParams,
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
    for first in range(0, min(start + QUERY_TILE, segment.length), positions):
        begin = first // cache.block_size
        blocks = segment.blocks[begin : begin + per_tile]
        blocks = F.pad(blocks, (0, per_tile - blocks.shape[0]), value=int(blocks[0]))
        keys, values = cache.read(layer, cache.read_blocks(blocks, kv_heads))  # [KV, positions, D]
        values[:, max(0, segment.length - first) :] = 0  # a former owner's, maybe NaN, and 0 * NaN is NaN
        scores = torch.bmm(grouped, keys.float().transpose(1, 2).contiguous()) * params.scale
        if params.softcap is not None:
            scores = torch.tanh(scores / params.softcap) * params.softcap
        mask = causal_mask(start, QUERY_TILE, first, positions, params.window, device).repeat_interleave(group, 0)
        scores = scores.masked_fill(mask, float("-inf"))
        new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
        shift = torch.where(new_best.isinf(), torch.zeros_like(new_best), new_best)
        weights = torch.exp(scores - shift)
        decay = torch.exp(torch.where(best.isinf(), best, best - shift))
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + torch.bmm(weights, values.float())
        best = new_best
    # A padding row behind a window may have seen nothing: its 0 / 0 is dropped by the caller.
    return (out / total).view(kv_heads, QUERY_TILE, group, -1).transpose(0, 1).flatten(1, 2)


def causal_mask(
    start: int, rows: int, first: int, length: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """[rows, length]: True where the query at position start + i must not see position first + j."""
    query = torch.arange(start, start + rows, device=device)[:, None]
    place = torch.arange(first, first + length, device=device)[None, :]
    mask = place > query
    return mask if window is None else mask | (place <= query - window)

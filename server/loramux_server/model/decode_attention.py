"""Attention of one query row per request, and which implementation of it a server uses.

Here in plain torch: gather the rows' blocks, two batched products. Runs everywhere; `native_decode` gathers nothing.
"""

from __future__ import annotations

import torch

from loramux_server.model.attention_metadata import AttentionParams, DecodeAttention, DecodeBatch
from loramux_server.model.cache import PagedCache
from loramux_server.model.native_decode import find_native_decode


def attend_rows(
    cache: PagedCache, layer: int, query: torch.Tensor, rows: DecodeBatch, params: AttentionParams
) -> torch.Tensor:
    """See `DecodeAttention`."""
    kv_heads = cache.layers[layer].heads
    keys, values = cache.read(layer, rows.gather(cache, kv_heads))  # [B, KV, L, D]
    batch, _, length, _ = keys.shape
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # [B, KV, G, D]
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float().mul_(params.scale)  # [B, KV, G, L]
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    mask = rows.mask(length, params.window)
    # Filled in, on both sides: what a former owner left may be NaN, or so large that a score is inf, and neither
    # inf - inf nor 0 * NaN is 0.
    scores.masked_fill_(mask[:, None, None, :], float("-inf"))
    values.masked_fill_(mask[:, None, :, None], 0)
    probabilities = scores.softmax(-1).to(values.dtype)
    return torch.matmul(probabilities, values).reshape(batch, query.shape[1], -1)


def select_decode(device: torch.device, dtype: torch.dtype) -> DecodeAttention:
    """The fastest there is."""
    native = find_native_decode() if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) else None
    return attend_rows if native is None else native

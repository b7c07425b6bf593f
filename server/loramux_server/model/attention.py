"""Attention over the paged cache for unmodified Hugging Face models, registered as an attention function.

Every row attends to the positions of its own request up to itself: decode rows by the step's `DecodeAttention`,
prefills by the library's, all by the tiled form where the step asks for it. Knows rows and blocks, not requests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from loramux_server.model.attention_metadata import AttentionMetadata, AttentionParams, PrefillSegment
from loramux_server.model.cache import PagedCache
from loramux_server.model.tiled_attention import attend_tiled, causal_mask

ATTENTION_NAME = "loramux_paged"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]
    value: torch.Tensor,  # [1, KV, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    ctx: AttentionMetadata,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,  # judged when the base was probed; windows too, which some models carry in their masks only
) -> tuple[torch.Tensor, None]:
    """Writes this step's keys and values to the cache and attends; returns ([1, T, H, Dv], None)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    ctx.write(layer, key[0], value[0])
    rows = query[0].transpose(0, 1)  # [T, H, D]
    params = AttentionParams(scale, ctx.cache.layers[layer].window, softcap)
    only = ctx.decodes[0] if len(ctx.decodes) == 1 and not ctx.prefills else None
    if only is not None and only.rows is None:
        return ctx.decode(ctx.cache, layer, rows, only, params)[None], None
    out = rows.new_zeros(rows.shape[0], rows.shape[1], value.shape[3])
    for decode in ctx.decodes:
        picked = rows if decode.rows is None else rows[decode.rows]
        attended = ctx.decode(ctx.cache, layer, picked, decode, params)
        if decode.rows is None:
            out.copy_(attended)
        else:
            out[decode.rows] = attended
    for segment in ctx.prefills:
        attend = attend_tiled if ctx.tiled else _span
        out[segment.first : segment.last] = attend(
            ctx.cache, layer, rows[segment.first : segment.last], segment, params
        )
    return out[None], None


def _span(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [n, H, D]
    segment: PrefillSegment,
    params: AttentionParams,
) -> torch.Tensor:
    """A chunk of one request over everything before and in it -> [n, H, Dv]."""
    if params.softcap is not None:
        return attend_tiled(cache, layer, query, segment, params)
    keys, values = cache.read(layer, segment.gather(cache, cache.layers[layer].heads))  # [KV, L, D]
    keys, values = keys[:, : segment.length], values[:, : segment.length]
    causal = segment.start == 0 and (params.window is None or params.window >= segment.length)
    mask = None
    if not causal:
        masked = causal_mask(segment.start, query.shape[0], 0, segment.length, params.window, query.device)
        mask = torch.zeros(masked.shape, dtype=query.dtype, device=query.device).masked_fill_(masked, float("-inf"))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=causal,
        scale=params.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def use_paged_attention(model: PreTrainedModel) -> None:
    """From now on `model` attends here. No mask function is registered under the name, so no mask is built."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    model.set_attn_implementation(ATTENTION_NAME)

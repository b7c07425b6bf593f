"""Attention over the paged cache for unmodified Hugging Face models, registered as an attention function.

Every row attends to the positions of its own request up to itself: decode rows by the step's `DecodeAttention`, spans
by the library's, all by the tiled form where the step asks for it. Knows rows and blocks, not requests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from loramux_server.model.cache import PagedCache
from loramux_server.model.paged_context import Limits, PagedContext, Span
from loramux_server.model.tiled_attention import attend_tiled, hidden_positions

ATTENTION_NAME = "loramux_paged"


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]
    value: torch.Tensor,  # [1, KV, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    ctx: PagedContext,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,  # judged when the base was probed; windows too, which some models carry in their masks only
) -> tuple[torch.Tensor, None]:
    """Writes this step's keys and values to the cache and attends; returns ([1, T, H, Dv], None)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    ctx.write(layer, key[0], value[0])
    rows = query[0].transpose(0, 1)  # [T, H, D]
    limits = Limits(scale, ctx.cache.layers[layer].window, softcap)
    only = ctx.decodes[0] if len(ctx.decodes) == 1 and not ctx.spans else None
    if only is not None and only.rows is None:
        return ctx.decode(ctx.cache, layer, rows, only, limits)[None], None
    out = rows.new_zeros(rows.shape[0], rows.shape[1], value.shape[3])
    for decode in ctx.decodes:
        picked = rows if decode.rows is None else rows[decode.rows]
        attended = ctx.decode(ctx.cache, layer, picked, decode, limits)
        if decode.rows is None:
            out.copy_(attended)
        else:
            out[decode.rows] = attended
    for span in ctx.spans:
        attend = attend_tiled if ctx.tiled else _span
        out[span.first : span.last] = attend(ctx.cache, layer, rows[span.first : span.last], span, limits)
    return out[None], None


def _span(
    cache: PagedCache,
    layer: int,
    query: torch.Tensor,  # [n, H, D]
    span: Span,
    limits: Limits,
) -> torch.Tensor:
    """A chunk of one request over everything before and in it -> [n, H, Dv]."""
    if limits.softcap is not None:
        return attend_tiled(cache, layer, query, span, limits)
    keys, values = cache.read(layer, span.gather(cache, cache.layers[layer].heads))  # [KV, L, D]
    keys, values = keys[:, : span.length], values[:, : span.length]
    causal = span.start == 0 and (limits.window is None or limits.window >= span.length)
    mask = None
    if not causal:
        hidden = hidden_positions(span.start, query.shape[0], 0, span.length, limits.window, query.device)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=causal,
        scale=limits.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def use_paged_attention(model: PreTrainedModel) -> None:
    """From now on `model` attends here. No mask function is registered under the name, so no mask is built."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    model.set_attn_implementation(ATTENTION_NAME)

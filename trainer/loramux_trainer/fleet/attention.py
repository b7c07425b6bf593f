"""Attention of a micro-batch: each sequence by itself, so that none decides another's memory or bits.

Registered as an attention function of transformers under a name of the fleet's own: the registry is global, and two
fleets in one process must not read each other's rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.parts.kv_prefix import KvPrefix
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.fleet.rows import StepCell
from loramux_trainer.fleet.sites import Change, changed, with_virtual_rows

_COUNTER = itertools.count()


def register_attention(cell: StepCell, layers: Sequence[AttentionLayer], layer_names: Sequence[str]) -> str:
    """Returns the name under which a model attends to the sequences of `cell`."""
    name = f"loramux_fleet_{next(_COUNTER)}"

    def attend(
        module: nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, Dv]
        attention_mask: object,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,  # judged when the base was examined
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        key, value = _with_prefixes(cell, layer_names[layer], key, value)
        parts = zip(*(_sequences(each, cell.lengths) for each in (query, key, value)), strict=True)
        out = [_attend_alone(q, k, v, layers[layer].window, scale, softcap).transpose(1, 2) for q, k, v in parts]
        return torch.cat(out, 1), None

    AttentionInterface.register(name, attend)
    return name


def _sequences(heads: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """[1, H, T, D] -> each sequence's [1, H, n, D]; cut where tokens are rows in memory, and so are its gradients."""
    return [each.transpose(1, 2) for each in torch.split(heads.transpose(1, 2), list(lengths), 1)]


def _attend_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence: [1, H, n, D] over [1, KV, n, D] -> [1, H, n, Dv]."""
    length = query.shape[2]
    if softcap is None and (window is None or window >= length):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    places = torch.arange(length, device=query.device)
    masked = places[None] > places[:, None]
    if window is not None:
        masked |= places[None] <= places[:, None] - window
    if softcap is None:
        mask = torch.zeros(masked.shape, dtype=query.dtype, device=query.device).masked_fill_(masked, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = torch.tanh(query.float() @ key.float().transpose(2, 3) * (scale / softcap)) * softcap
    weights = F.softmax(scores.masked_fill(masked, float("-inf")), -1)
    return (weights @ value.float()).to(query.dtype)


def _with_prefixes(
    cell: StepCell, layer_name: str, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained keys and values in place of those of virtual tokens, as a server writes them to its cache."""
    tokens, ids = cell.tokens, cell.ids
    if tokens is None or ids is None or not any(span.parts.get(layer_name, KvPrefix) for span in tokens.spans):
        return key, value
    heads, count, width = key.shape[1:]
    split = heads * width
    both = torch.cat([each[0].transpose(0, 1).reshape(count, -1) for each in (key, value)], dim=1)  # [T, ...]
    both = changed(ids, both, tokens, lambda span: span.parts.bound(layer_name, partial(_bind, layer_name)))
    return (
        both[:, :split].view(count, heads, width).transpose(0, 1)[None],
        both[:, split:].view(count, heads, value.shape[3]).transpose(0, 1)[None],
    )


def _bind(layer_name: str, parts: StepParts) -> Change | None:
    prefix = parts.get(layer_name, KvPrefix)
    return None if prefix is None else partial(with_virtual_rows, parts.leaf(prefix.rows).as_variable())

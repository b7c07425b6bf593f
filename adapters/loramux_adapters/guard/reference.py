"""Packed steps on plain lists of keys and values: the arithmetic of serving without its memory.

The reference that a paged cache is held to, and what a trainer asks whether the base it trains on can be served.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from loramux_adapters.guard.exactness import Piece
from loramux_adapters.guard.layers import AttentionLayer
from loramux_adapters.guard.rope import RopeChoice, choosing

REFERENCE_NAME = "loramux_reference"


class ReferencePacked:
    """Implements `exactness.PackedModel` for a model that nothing was put into."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[AttentionLayer], rope: RopeChoice | None = None
    ) -> None:
        AttentionInterface.register(REFERENCE_NAME, _attention)
        model.set_attn_implementation(REFERENCE_NAME)
        self._model, self._layers, self._rope = model, tuple(layers), rope
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (sequence, layer) -> [KV, n, D]
        self._pieces: list[Piece] = []

    def preload(self, sequence: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Keys and values of a sequence's first positions, per layer [heads, n, width]."""
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            self._kept[sequence, layer] = pair

    def step(self, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> list[torch.Tensor]:
        """One forward of all pieces packed into one row."""
        self._pieces = [piece for piece, _ in pieces]
        ids = torch.cat([tokens for _, tokens in pieces])
        positions = torch.cat([torch.arange(p.start, p.stop, device=ids.device) for p, _ in pieces])
        long = [
            self._rope is not None and self._rope.is_long(p.length) for p, _ in pieces for _ in range(p.start, p.stop)
        ]
        with choosing(self._rope, torch.tensor(long, device=ids.device)):
            output = self._model(
                input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False, ctx=self
            )
        return list(output.logits[0].split([p.stop - p.start for p, _ in pieces]))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [H, T, D], key and value [KV, T, D] of this step -> [T, H, Dv]."""
        rows, out = 0, []
        for piece in self._pieces:
            stop = rows + piece.stop - piece.start
            keys, values = key[:, rows:stop], value[:, rows:stop]
            before = self._kept.get((piece.sequence, layer))
            if before is not None:
                keys, values = torch.cat((before[0], keys), 1), torch.cat((before[1], values), 1)
            self._kept[piece.sequence, layer] = keys, values
            out.append(_one(query[:, rows:stop], keys, values, piece.start, self._layers[layer].window, scale, softcap))
            rows = stop
        return torch.cat(out)


def _one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence: query [H, n, D] at positions start .. over keys and values [KV, L, D] -> [n, H, Dv]."""
    share = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
    scores = query.float() @ keys.float().transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    rows = torch.arange(start, start + query.shape[1], device=query.device)[:, None]
    place = torch.arange(keys.shape[1], device=query.device)[None]
    masked = place > rows if window is None else (place > rows) | (place <= rows - window)
    weights = F.softmax(scores.masked_fill(masked, float("-inf")), -1)
    return (weights @ values.float()).to(query.dtype).transpose(0, 1)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    ctx: ReferencePacked,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,  # judged by the probe
) -> tuple[torch.Tensor, None]:
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return ctx.attend(layer, query[0], key[0], value[0], scale, softcap)[None], None

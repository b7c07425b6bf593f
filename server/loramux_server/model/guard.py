"""The serving path asked about a base it is about to serve: packed steps over the paged cache, as the runner lays them
out, against the untouched model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.guard.exactness import Piece, Truth, check_exact
from loramux_adapters.guard.examine import refusals_of
from loramux_adapters.guard.rope import RopeChoice
from loramux_server.engine.plan import BASE_SLOT, Chunk
from loramux_server.model.attention import use_paged_attention
from loramux_server.model.attention_metadata import DecodeAttention
from loramux_server.model.cache import PagedCache
from loramux_server.model.forward import forward
from loramux_server.model.forward_batch import build_batch
from loramux_server.requests import SamplingParams

_EVERY_ROW = SamplingParams(temperature=0.0, prompt_logprobs=0)


def self_check(
    adapted: AdaptedModel,
    cache: PagedCache,
    truth: Truth,
    *,
    rope: RopeChoice | None,
    decode: DecodeAttention,
    tiled: bool,
) -> float:
    """Computes the steps of `truth` as serving does and returns the largest relative error.

    Writes to blocks of an empty cache. Raises BaseRefused on a mismatch.
    """
    use_paged_attention(adapted.model)
    with refusals_of(adapted.base):
        steps = _PagedSteps(adapted, cache, truth, rope, decode, tiled)
        return check_exact(truth, steps, adapted.base.compute_dtype)


class _PagedSteps:
    """Implements `exactness.PackedModel` on the server's own cache; sequences lie one after the other in its blocks."""

    def __init__(
        self,
        adapted: AdaptedModel,
        cache: PagedCache,
        truth: Truth,
        rope: RopeChoice | None,
        decode: DecodeAttention,
        tiled: bool,
    ) -> None:
        self._adapted, self._cache, self._rope, self._decode, self._tiled = adapted, cache, rope, decode, tiled
        self._blocks: list[tuple[int, ...]] = []
        first = 0
        for index, ids in enumerate(truth.ids):
            before = truth.far_start if index == len(truth.ids) - 1 else 0
            count = -(-(before + len(ids)) // cache.block_size)
            self._blocks.append(tuple(range(first, first + count)))
            first += count

    def preload(self, sequence: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Writes a sequence's first positions, per layer [heads, n, width]."""
        first = self._blocks[sequence][0] * self._cache.block_size
        slots = torch.arange(first, first + keys[0].shape[1], device=keys[0].device)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self._cache.write(layer, self._cache.write_rows(slots, key.shape[0]), key, value)

    @torch.inference_mode()
    def step(self, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> list[torch.Tensor]:
        """One forward; logits of every row, in the order of `pieces`."""
        chunks = [self._chunk(piece, ids) for piece, ids in pieces]
        batch = build_batch(chunks, self._cache, self._cache.blocks - 1, tiled=self._tiled, decode=self._decode)
        logits = forward(self._adapted.model, batch, self._rope)
        self._adapted.reset()
        of = {chunk.request_id: rows for chunk, rows in zip(batch.chunks, batch.logits_of, strict=True)}
        return [logits[slice(*of[chunk.request_id])] for chunk in chunks]

    def _chunk(self, piece: Piece, ids: torch.Tensor) -> Chunk:
        blocks = self._blocks[piece.sequence]
        return Chunk(
            str(piece.sequence), tuple(ids.tolist()), piece.start, blocks, BASE_SLOT, False, _EVERY_ROW, piece.stop,
            long_rope=self._rope is not None and self._rope.is_long(piece.length),
        )  # fmt: skip

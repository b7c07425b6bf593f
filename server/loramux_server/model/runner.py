"""Computes the chunks of one step: prepare -> forward -> sample.

Knows chunks and slots; not who asked, nor why this step looks as it does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loramux_adapters.apply.batch import AdapterBatch, MergedWeights, RowMap
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.guard.rope import RopeChoice
from loramux_adapters.kernels.protocol import Kernels
from loramux_server.engine.plan import Chunk, Sampled, StepResult, StepTiming
from loramux_server.model.attention import use_paged_attention
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import select_decode
from loramux_server.model.forward import forward
from loramux_server.model.forward_batch import ForwardBatch, build_batch
from loramux_server.model.sampler import Sampler
from loramux_server.requests import RequestFailure, TokenLogprob


@dataclass(frozen=True)
class RunnerConfig:
    """`deterministic`: a row's numbers depend on its own request alone, at a cost (see docs/architecture.md).

    `rope` is where rows choose their rotary factors, on bases of type longrope.
    """

    deterministic: bool = False
    rope: RopeChoice | None = None


class ModelRunner:
    """One injected Hugging Face model, its KV cache and what its sampler remembers of requests."""

    def __init__(self, adapted: AdaptedModel, cache: PagedCache, kernels: Kernels, config: RunnerConfig) -> None:
        use_paged_attention(adapted.model)
        self.adapted = adapted
        self._cache, self._kernels, self._config = cache, kernels, config
        self._decode = select_decode(adapted.base.device, adapted.base.compute_dtype)
        self._sampler = Sampler(adapted.spec.vocab_size, adapted.base.device)

    def retire(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have ended."""
        self._sampler.retire(request_ids)

    def run(self, step: int, chunks: Sequence[Chunk], merged: MergedWeights | None) -> StepResult:
        """One forward of at least one chunk, and one draw. Whatever it raises, the same chunks may run again: what a
        request remembers of a step is entered once, by position.
        """
        try:
            return self._run(step, chunks, merged)
        except BaseException:
            self.adapted.reset()
            raise

    def _run(self, step: int, chunks: Sequence[Chunk], merged: MergedWeights | None) -> StepResult:
        started = time.perf_counter()
        batch = build_batch(
            chunks,
            self._cache,
            self._cache.blocks - 1,
            tiled=self._config.deterministic,
            decode=self._decode,
        )
        has_virtual_ids = any(chunk.start < chunk.virtual_tokens for chunk in chunks)
        adapters = self._map_rows(batch, merged, has_virtual_ids, self._widest(chunks))
        if has_virtual_ids:
            batch.context.replace = partial(self._replace_kv, batch.ids)
        prepared = time.perf_counter()
        logits = self._forward(batch, adapters)
        forwarded = time.perf_counter()
        sampled, prompt_logprobs, failures = self._sample(batch, logits)
        timing = StepTiming(prepared - started, forwarded - prepared, time.perf_counter() - forwarded)
        return StepResult(step, sampled, prompt_logprobs, failures, timing)

    def _replace_kv(
        self, ids: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer >= len(self.adapted.attention):
            return key, value
        return self.adapted.attention[layer].replace(ids, key, value)

    def _widest(self, chunks: Sequence[Chunk]) -> int:
        """The vocabulary that the step's logits must hold, 0 for the base's. Raises ValueError for an id beyond that of
        its own adapter: beside a wider one the embedding would not notice.
        """
        own = self.adapted.slot_vocabularies
        if not any(chunk.slot in own for chunk in chunks):
            return 0
        for chunk in chunks:
            if max(chunk.tokens) >= self.adapted.vocabulary(chunk.slot):
                raise ValueError(f"{chunk.request_id} has a token id beyond {self.adapted.vocabulary(chunk.slot)}")
        widest = max(self.adapted.vocabulary(chunk.slot) for chunk in chunks)
        self._sampler.widen(widest)
        return widest

    def _map_rows(
        self, batch: ForwardBatch, merged: MergedWeights | None, has_virtual_ids: bool, vocabulary: int
    ) -> AdapterBatch:
        tokens, logits = batch.token_slots, batch.logit_slots
        all_tokens, all_logits = self._map(tokens, has_virtual_ids), self._map(logits, has_virtual_ids)
        if merged is None:
            return AdapterBatch(all_tokens, all_logits, vocabulary=vocabulary)
        return AdapterBatch(
            all_tokens,
            all_logits,
            merged,
            shared_tokens=self._map(tokens[: batch.shared_rows], has_virtual_ids),
            shared_logits=self._map(logits[: batch.shared_logits], has_virtual_ids),
            vocabulary=vocabulary,
        )

    def _map(self, slots: Sequence[int], has_virtual_ids: bool) -> RowMap:
        return RowMap(
            slots,
            self._kernels,
            self.adapted.base.device,
            self.adapted.slot_kinds,
            has_virtual_ids=has_virtual_ids,
        )

    def _forward(self, batch: ForwardBatch, adapters: AdapterBatch) -> torch.Tensor:
        """Logits [n, vocab] of the batch's logit rows, as wide as the widest vocabulary among them."""
        with self.adapted.cell.running(adapters):
            return forward(self.adapted.model, batch, self._config.rope)

    def _sample(
        self, batch: ForwardBatch, logits: torch.Tensor
    ) -> tuple[dict[str, Sampled], dict[str, tuple[TokenLogprob | None, ...]], dict[str, RequestFailure]]:
        self._sampler.observe(batch.chunks)
        prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = {}
        failures: dict[str, RequestFailure] = {}
        last_rows: list[int] = []
        sampling = []
        for chunk, (first, last) in zip(batch.chunks, batch.logits_of, strict=True):
            if last > first and chunk.params.prompt_logprobs is not None and chunk.start < chunk.prompt_length:
                own = logits[first:last, : self.adapted.vocabulary(chunk.slot)].contiguous()
                found = self._sampler.prompt_logprobs(chunk, own)
                if isinstance(found, RequestFailure):
                    failures[chunk.request_id] = found
                    continue
                prompt_logprobs[chunk.request_id] = found
            if chunk.samples:
                sampling.append(chunk)
                last_rows.append(last - 1)
        if len(last_rows) != logits.shape[0]:
            logits = logits[last_rows]
        widths = [self.adapted.vocabulary(chunk.slot) for chunk in sampling]
        sampled, failed = self._sampler.sample(sampling, logits, widths)
        return sampled, prompt_logprobs, failures | failed

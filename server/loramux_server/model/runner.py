"""Runs one plan on the device: the only class that touches it while serving.

prepare -> forward -> sample. Knows chunks and slots; not who asked, nor why this step looks as it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loramux_adapters.apply.batch import AdapterBatch, MergedWeights, RowMap
from loramux_adapters.apply.inject import AdaptedModel
from loramux_adapters.device import use_device
from loramux_adapters.guard.rope import RopeChoice
from loramux_adapters.kernels.protocol import Kernels
from loramux_server.engine.plan import DeviceLost, Sampled, StepOutOfMemory, StepPlan, StepResult, StepTiming
from loramux_server.model.attention import use_paged_attention
from loramux_server.model.cache import PagedCache
from loramux_server.model.decode_attention import select_decode
from loramux_server.model.faults import is_device_lost, is_out_of_memory
from loramux_server.model.forward import forward
from loramux_server.model.forward_batch import ForwardBatch, build_batch
from loramux_server.model.sampler import Sampler
from loramux_server.requests import RequestFailure, TokenLogprob


@dataclass(frozen=True)
class RunnerConfig:
    """`deterministic`: a row's numbers depend on its own request alone, at a cost (see docs/structure.md).

    `rope` is where rows choose their rotary factors, on bases of type longrope.
    """

    deterministic: bool = False
    rope: RopeChoice | None = None


class ModelRunner:
    """Implements `engine.execution.Runner` for an injected Hugging Face model."""

    def __init__(
        self,
        adapted: AdaptedModel,
        cache: PagedCache,
        kernels: Kernels,
        config: RunnerConfig,
        merged: Callable[[str], MergedWeights | None] = lambda digest: None,
    ) -> None:
        use_paged_attention(adapted.model)
        self._adapted, self._cache, self._kernels, self._config = adapted, cache, kernels, config
        self._merged = merged
        self._decode = select_decode(adapted.base.device, adapted.base.compute_dtype)
        self._sampler = Sampler(adapted.spec.vocab_size, adapted.base.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """One forward and one draw. Whatever it raises, the same chunks may run again: what a request remembers of a
        step is entered once, by position.

        Raises StepOutOfMemory, and DeviceLost after a fault that the process cannot recover from.
        """
        use_device(self._adapted.base.device)  # of the thread that calls: the engine's
        try:
            return self._run(plan)
        except BaseException as error:
            self._adapted.forget()
            if is_out_of_memory(error):
                raise StepOutOfMemory(str(error)) from error
            if is_device_lost(error):
                raise DeviceLost(str(error)) from error
            raise

    def _run(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        self._sampler.retire(plan.retired)
        if not plan.chunks:
            return StepResult(plan.step, {})
        batch = build_batch(
            plan.chunks,
            self._cache,
            self._cache.blocks - 1,
            tiled=self._config.deterministic,
            decode=self._decode,
        )
        adapters = self._adapter_batch(batch, plan.merged)
        prepared = time.perf_counter()
        logits = self._forward(batch, adapters)
        forwarded = time.perf_counter()
        sampled, prompt_logprobs, failures = self._sample(batch, logits)
        timing = StepTiming(prepared - started, forwarded - prepared, time.perf_counter() - forwarded)
        return StepResult(plan.step, sampled, prompt_logprobs, failures, timing)

    def _adapter_batch(self, batch: ForwardBatch, merged: str | None) -> AdapterBatch:
        device = self._adapted.base.device
        dense = None
        if merged is not None:
            dense = self._merged(merged)  # may have been dropped since the plan: the slots serve as well
        return AdapterBatch(
            RowMap(batch.token_slots, self._kernels, device, self._adapted.slot_kinds),
            RowMap(batch.logit_slots, self._kernels, device, self._adapted.slot_kinds),
            dense,
        )

    def _forward(self, batch: ForwardBatch, adapters: AdapterBatch) -> torch.Tensor:
        """Logits [n, vocab] of the batch's logit rows."""
        with self._adapted.cell.running(adapters):
            return forward(self._adapted.model, batch, self._config.rope)

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
                found = self._sampler.prompt_logprobs(chunk, logits[first:last])
                if isinstance(found, RequestFailure):
                    failures[chunk.request_id] = found
                    continue
                prompt_logprobs[chunk.request_id] = found
            if chunk.samples:
                sampling.append(chunk)
                last_rows.append(last - 1)
        if len(last_rows) != logits.shape[0]:
            logits = logits[last_rows]
        sampled, failed = self._sampler.sample(sampling, logits)
        return sampled, prompt_logprobs, failures | failed

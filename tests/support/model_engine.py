"""The real scheduler, pool, runner and layers around a small model, driven step by step in the test's own thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.apply.batch import AdapterBatch
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.merge import merged_bytes
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.base.weight_formats import WeightFormats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.registry import read
from loramux_adapters.guard.examine import Examined, examine
from loramux_adapters.kernels.select import select_kernels
from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.pool import AdapterPool
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.weights import AdapterWeights
from loramux_server.api.activation import place_adapter
from loramux_server.engine.execution import execute_contained
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.scheduler import Scheduler
from loramux_server.model.cache import PagedCache
from loramux_server.model.forward_batch import ForwardBatch
from loramux_server.model.merged_weights import MergedWeightsCache
from loramux_server.model.merging import Merges
from loramux_server.model.runner import ModelRunner, RunnerConfig
from loramux_server.model.staging import StagedAdapters
from loramux_server.model.verification import Verification
from loramux_server.model.worker import Worker
from loramux_server.requests import SamplingParams, StopConditions, Submission, TokenEvent
from support.adapters import files_of


class Inline(Executor):
    """Runs what it is given at once, in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class RecordingRunner(ModelRunner):
    """Keeps the logits that predicted each sampled token, by request id."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logits: dict[str, list[torch.Tensor]] = defaultdict(list)

    def _forward(self, batch: ForwardBatch, adapters: AdapterBatch) -> torch.Tensor:
        logits = super()._forward(batch, adapters)
        for chunk, (_, last) in zip(batch.chunks, batch.logits_of, strict=True):
            if chunk.samples:
                own = logits[last - 1, : self.adapted.vocabulary(chunk.slot)]
                self.logits[chunk.request_id].append(own.float().clone())
        return logits


class ModelEngine:
    """One base and the adapters of some PEFT directories; submit, step, read tokens."""

    runner_type: type[ModelRunner] = RecordingRunner

    def __init__(
        self,
        base: LoadedBase,
        adapters: dict[str, Path],
        *,
        deterministic: bool = False,
        capacity: int = 512,
        weight_formats: WeightFormats = WeightFormats(),
        dense_bytes: int = 1 << 30,
        stack: bool = True,
        **limits: Any,
    ) -> None:
        kernels = select_kernels(deterministic=deterministic, device=base.device, dtype=base.compute_dtype)
        examined = self.examine(base)
        weight_formats = replace(weight_formats, invariant=deterministic)
        self.adapted = inject(base, capacity=capacity, weight_formats=weight_formats, stack=stack)
        self.limits = EngineLimits(
            **(
                {
                    "kv_blocks": 256,
                    "block_tokens": 16,
                    "deterministic": deterministic,
                    "prefill_chunk": 64,
                    "original_context": None if examined.rope is None else examined.rope.original_context,
                }
                | limits
            )
        )
        cache = PagedCache(
            examined.layers, self.limits.kv_blocks + 1, self.limits.block_tokens, base.compute_dtype, base.device
        )
        self.weights: dict[str, AdapterWeights] = {}
        self.digests: dict[str, str] = {}
        for name, path in adapters.items():
            weights = self.read(path, base.spec)
            self.digests[name] = weights.spec.digest
            self.weights[weights.spec.digest] = weights
        self.staged, self.merges = StagedAdapters(SlotTensors(self.adapted), lambda: None), Merges(self.adapted)
        self.pool = AdapterPool(
            SlotTable(self.adapted.linears, capacity, 4096, 1 << 28),
            self.staged,
            HostCache(self.weights.__getitem__, 1 << 30),
            Inline(),
            lambda: None,
        )
        self.merged_weights = MergedWeightsCache(
            self.merges, partial(merged_bytes, self.adapted), self.weights.__getitem__, lambda: None, dense_bytes
        )
        self.runner = self.runner_type(self.adapted, cache, kernels, RunnerConfig(deterministic, examined.rope))
        self.worker = Worker(self.runner, self.staged, self.merges, Verification(self.adapted))
        self.scheduler = Scheduler(self.limits, self.pool, self.merged_weights)
        self.events: dict[tuple[int, int], list[TokenEvent]] = defaultdict(list)
        self.plans: list[StepPlan] = []
        self._tickets = 0
        self._now = 0.0

    def examine(self, base: LoadedBase) -> Examined:
        """How the base attends."""
        return examine(base, base.spec.context_length)

    def read(self, path: Path, base: BaseModelSpec) -> AdapterWeights:
        """An adapter in host memory."""
        return read(files_of(path), base, ReadLimits())

    def submit(self, adapter: str | None, prompt: Sequence[int], count: int, **more: Any) -> int:
        """Queues a greedy request (or `sampling`); returns its ticket."""
        self._tickets += 1
        digest = None if adapter is None else self.digests[adapter]
        sampling = more.pop("sampling", SamplingParams(temperature=0.0))
        submission = Submission(
            f"r{self._tickets}", "t", digest, tuple(prompt), sampling, StopConditions(ignore_eos=True), count, **more
        )
        spec = None if digest is None else self.weights[digest].spec
        self.scheduler.submit(self._tickets, place_adapter(submission, spec), self._now)
        return self._tickets

    def step(self) -> StepPlan:
        """One turn of the loop."""
        self._now += 1.0
        plan = self.scheduler.plan(self._now)
        if plan.chunks or plan.has_commands or self.worker.is_busy:
            result = execute_contained(self.worker, plan)
        if plan.chunks:
            self.scheduler.commit(plan, result, self._now)
            self.plans.append(plan)
        for ticket, event in self.scheduler.take_events():
            self.events[ticket, event.choice].append(event)
        return plan

    def run(self, most: int = 2000) -> None:
        """Turns until nothing is live; then nothing is held."""
        for _ in range(most):
            if self.scheduler.is_idle:
                self.scheduler.tables.pool.check()
                self.pool.check()
                assert self.pool.stats().leases == 0
                return
            self.step()
        raise AssertionError("still not idle")

    def settle_merges(self) -> None:
        """Turns until every merge that is desired now is ready or refused."""
        for _ in range(1000):
            self.merged_weights._loader.submit(lambda: None).result(60)  # reads what was asked for so far
            plan = self.step()
            if not plan.merge and not self.worker.is_busy:
                return
        raise AssertionError("still merging")

    def tokens(self, ticket: int, choice: int = 0) -> list[int]:
        """Output so far."""
        return [event.token for event in self.events[ticket, choice] if event.token is not None]

    def logits(self, ticket: int) -> torch.Tensor:
        """[tokens, vocab]: what predicted each output token of a request that was never preempted."""
        assert isinstance(self.runner, RecordingRunner)
        return torch.stack(self.runner.logits[f"{ticket}:r{ticket}#0"])

"""The driver for the engine in this process: what a server computes, without its network.

Assembles a server's inside exactly as `loramux serve` does and submits token ids to its engine client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loramux.bench.driver import EVICTIONS, LOADS, PROCESSOR_SECONDS, Call, DriverFailed, Push, Trace
from loramux.upload import collect
from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store.records import FileEntry, UploadManifest
from loramux_server.api.activation import place_adapter
from loramux_server.app import build_engine
from loramux_server.config import resolve_config
from loramux_server.held import Resolved
from loramux_server.observe.metrics import Metrics
from loramux_server.requests import SamplingParams, StopConditions, Submission
from loramux_server.runtime import EngineCallbacks, ServerRuntime

if TYPE_CHECKING:
    from loramux.bench.stages import StageClock

TENANT = "default"
_STOP_SECONDS = 10.0


class EngineDriver:
    """`options` are the server's; `metrics` may be a subclass that watches the steps, `stages` a clock that runs.

    The store is in `scratch`, or in the options' `data_dir`, where adapters found by name are taken for the same ones.
    """

    name = "engine"

    def __init__(
        self,
        adapters: Sequence[Path],
        *,
        options: Mapping[str, str],
        scratch: Path,
        metrics: Metrics | None = None,
        stages: StageClock | None = None,
    ) -> None:
        self._paths = adapters
        flags = {"data_dir": str(scratch), **options, "metrics_listen": "none"}
        self._config = resolve_config(flags=flags).config
        self._metrics = metrics or Metrics()
        self._stages = stages
        self._built: ServerRuntime | None = None
        self._resolved: list[Resolved] = []
        self._death: BaseException | None = None
        self._count = 0

    async def start(self) -> None:
        hooks = EngineCallbacks(asyncio.get_running_loop(), self._metrics, self._note_death)
        self._built = built = await asyncio.to_thread(build_engine, self._config, hooks)
        built.engine.start()
        for path in self._paths:
            with suppress(AdapterNotFound):
                self._resolved.append(built.services.registry.resolve(TENANT, path.name))
                continue
            await self.push(path, path.name)

    async def run(self, calls: Sequence[Call], output_tokens: int, salt: str) -> list[Trace]:
        lengths = [call.output_tokens or output_tokens for call in calls]
        answers = (self._one(call, length, salt) for call, length in zip(calls, lengths, strict=True))
        return list(await asyncio.gather(*answers))

    def readings(self) -> Mapping[str, float]:
        reading = self._running.reading()
        return {
            LOADS: reading.loads_total["ok"],
            EVICTIONS: reading.evictions_total["resident"],
            PROCESSOR_SECONDS: time.process_time(),
        }

    async def close(self) -> None:
        built, self._built = self._built, None
        if built is None:
            return
        for resolved in self._resolved:
            resolved.release()
        self._resolved.clear()
        built.services.engine.drain()
        await asyncio.to_thread(built.engine.stop, 0.0, _STOP_SECONDS)
        await asyncio.to_thread(built.close)

    async def push(self, path: Path, name: str) -> Push:
        registry = self._running.services.registry
        began = time.perf_counter()
        bundle = collect(path, name, {}, allow_base_mismatch=False)
        manifest = UploadManifest(name=name, files=tuple(FileEntry(f.file, f.size, f.sha256) for f in bundle.files))
        await registry.begin_upload(TENANT, bundle.upload_id, manifest)
        for entry in bundle.files:
            data = await asyncio.to_thread((path / entry.file).read_bytes)
            await registry.write_chunk(TENANT, bundle.upload_id, entry.file, 0, data)
        sent = time.perf_counter()
        await registry.publish(TENANT, bundle.upload_id)
        self._resolved.append(registry.resolve(TENANT, name))
        return Push(len(self._resolved) - 1, began, sent, time.perf_counter())

    def stages_of(self, push: Push, first: Trace) -> Mapping[str, float]:
        return {} if self._stages is None else self._stages.seconds(push.sent, first.sent, first.arrivals[0])

    @property
    def _running(self) -> ServerRuntime:
        if self._built is None:
            raise RuntimeError("the driver was not started")
        return self._built

    async def _one(self, call: Call, output_tokens: int, salt: str) -> Trace:
        self._count += 1
        spec = None if call.adapter is None else self._resolved[call.adapter].spec
        submission = Submission(
            request_id=f"bench-{self._count}",
            tenant=TENANT,
            digest=None if spec is None else spec.digest,
            prompt=call.prompt,
            sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(ignore_eos=True),
            max_tokens=output_tokens,
            cache_salt=salt,
        )
        submission = place_adapter(submission, spec)
        arrivals: list[float] = []
        sent = time.perf_counter()
        async with self._running.services.engine.submit(submission) as stream:
            async for event in stream:
                if event.failure is not None:
                    raise DriverFailed(f"engine: {event.failure.code}: {event.failure.message}") from self._death
                if event.token is not None:
                    arrivals.append(time.perf_counter())
        return Trace(sent, tuple(arrivals))

    def _note_death(self, error: BaseException) -> None:
        self._death = error

"""The composition root: what is started in which order, and stopped in the reverse.

gRPC listens first, so that health can say NOT_SERVING while the base loads; then store, base,
adapter pool, runner and engine (see `assembly`), one warm-up step, and calls are accepted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from loramux_adapters.errors import AdapterError
from loramux_adapters.spec import WeightCounts
from loramux_adapters.store.former_directory import move_former
from loramux_adapters.store.lock import DirectoryLock
from loramux_adapters.store.records import AdapterNames
from loramux_adapters.threads import SPINS, limit_spinning
from loramux_server.api.adapter_service import AdapterService
from loramux_server.api.gate import Gate, Services
from loramux_server.api.generate import GenerateUseCase
from loramux_server.api.grpc_server import GrpcOptions, GrpcServer, Shutdown
from loramux_server.api.inference_service import InferenceService
from loramux_server.api.server_limits import ServerLimits
from loramux_server.api.tokenizer_pool import TokenizerPool
from loramux_server.config import ServeConfig, default_data_dir
from loramux_server.drain import Drain
from loramux_server.errors import StartError
from loramux_server.observe.exporter import Exporter, Probes
from loramux_server.observe.logs import configure_logs
from loramux_server.observe.metrics import AdapterReading, Metrics
from loramux_server.preflight import check_start
from loramux_server.requests import RequestFailure, SamplingParams, StopConditions, Submission
from loramux_server.runtime import Build, EngineCallbacks, ServerRuntime

_LOG = logging.getLogger("loramux_server.app")
_TENANT = "default"
_WATCH_SECONDS = 1.0


def build_engine(config: ServeConfig, hooks: EngineCallbacks, lock: DirectoryLock | None = None) -> ServerRuntime:
    """The real inside. Imports torch, which is why nothing else here does."""
    if not limit_spinning():
        _LOG.warning(
            f"torch was imported before the server: on busy cores its threads spin; set GOMP_SPINCOUNT={SPINS}"
        )
    from loramux_server.assembly import assemble

    return assemble(config, hooks, lock)


class App:
    """One server. `start`, then `serve` until a signal or the engine's death, then `stop`.

    `lock` goes to `build`. `ends_process`: the process ends after that, see `Shutdown`.
    """

    def __init__(
        self,
        config: ServeConfig,
        build: Build = build_engine,
        *,
        lock: DirectoryLock | None = None,
        ends_process: bool = False,
    ) -> None:
        self._config = config
        self._build = build
        self._lock = lock
        self._ends_process = ends_process
        self._built: ServerRuntime | None = None
        self._exporter: Exporter | None = None
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._serving = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.metrics = Metrics(self._read_adapters, config.metrics_adapters, self._names_of, self._existing)
        self._gate = Gate()
        tokenizers = TokenizerPool()
        generate = GenerateUseCase(self._gate, self.metrics, tokenizers)
        self._server = GrpcServer(
            GrpcOptions(
                config.listen,
                max_message_bytes=config.max_message_bytes,
                stall_seconds=config.stall_seconds,
            ),
            self._gate,
            InferenceService(self._gate, _tenant_of, generate, tokenizers),
            AdapterService(self._gate, _tenant_of, self.metrics, config.stall_seconds),
            self.metrics.call,
        )

    @property
    def address(self) -> str:
        """Where gRPC listens, with the real port once started."""
        return self._server.address

    @property
    def metrics_address(self) -> str:
        """Where metrics are, empty without."""
        return self._exporter.address if self._exporter else ""

    async def start(self) -> None:
        """Listen, build, warm up, open. Raises StartError; whatever was started is stopped again then."""
        self._set_serving(False)
        try:
            await self._server.start()
            if self._config.metrics_listen != "none":
                probes = Probes(lambda: not self._exit_code, lambda: self._serving)
                self._exporter = Exporter(self.metrics.registry, self._config.metrics_listen, probes)
            self._loop = asyncio.get_running_loop()
            hooks = EngineCallbacks(self._loop, self.metrics, self._engine_died)
            built = self._built = await _in_daemon_thread(lambda: self._build(self._config, hooks, self._lock))
            built.engine.start()
            await _warm_up(built.services, self._config.step_timeout_seconds)
            await self._server.open(built.services)
        except BaseException:
            await self._abandon()
            raise
        self._set_serving(True)
        self.metrics.describe({key: value for key, value in self.describe().items() if key in _LABELS})

    async def serve(self) -> int:
        """Wait for a stop or the engine's death, then stop; returns the exit code."""
        watch = asyncio.create_task(self._watch())
        await self._stopping.wait()
        watch.cancel()
        await self.stop()
        return self._exit_code

    def request_stop(self, exit_code: int = 0) -> None:
        """End `serve`. On the event loop; idempotent, the first exit code counts."""
        if not self._stopping.is_set():
            self._exit_code = exit_code
            self._stopping.set()

    async def stop(self) -> None:
        """Drain and close in the order of the start, backwards. Idempotent."""
        self._set_serving(False)
        built, self._built = self._built, None
        if built is None:
            await self._server.shut_down(Shutdown(flush_seconds=0.0))
        elif self._exit_code:  # the engine is dead or hangs: nothing is left to wait for
            built.services.engine.drain()
            await self._server.shut_down(Shutdown(keeps_port=self._ends_process))
        else:
            config = self._config
            in_order = Shutdown(config.readiness_seconds, config.drain_seconds, keeps_port=self._ends_process)
            drain = Drain(built)
            drain.report(await self._server.shut_down(in_order, drain.end_work))
            await asyncio.to_thread(built.close)
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)
            self._exporter = None

    def describe(self) -> Mapping[str, str]:
        """What an operator wants to see at the start: base, device, limits, addresses."""
        if self._built is None:
            return {}
        model = self._built.services.model
        limits = model.limits
        return {
            "model": model.model_id,
            "fingerprint": model.fingerprint[:12],
            "device": model.device,
            "dtype": model.compute_dtype + (" deterministic" if model.deterministic else ""),
            "weights": _describe_weights(model.weights),
            "context": f"{limits.context_tokens} tokens" + _describe_rope(limits),
            "kv_cache": f"{limits.kv_tokens} tokens",
            "batch": f"{limits.max_running} requests, {limits.max_batch_tokens} tokens; {limits.max_queued} wait",
            "adapters": f"{limits.adapter_device_bytes >> 20} MiB on the device, rank up to {limits.max_rank}",
            "data": str(self._config.data_dir),
            "grpc": self.address,
            "metrics": f"http://{self.metrics_address}/metrics" if self._exporter else "none",
        }

    async def _abandon(self) -> None:
        """A start failed: leave nothing behind, wait for nothing."""
        self._gate.drain()
        built = self._built
        if built is not None:
            built.services.engine.drain()
        await self.stop()

    async def _watch(self) -> None:
        """A step that takes longer than any step may hangs: log it, fail what waits, and stop."""
        built = self._built
        while built is not None:
            await asyncio.sleep(_WATCH_SECONDS)
            age = time.monotonic() - built.engine.heartbeat
            if age > self._config.step_timeout_seconds:
                _LOG.critical("a step hangs", extra={"fields": {"seconds": age}})
                await self._server.refuse_work()
                built.services.engine.fail_all(RequestFailure("ENGINE_DEAD", "a step did not end"))
                self.request_stop(exit_code=1)
                return

    def _set_serving(self, serving: bool) -> None:
        self._serving = serving
        self.metrics.serving(serving)

    def _engine_died(self, error: BaseException) -> None:
        """On the engine thread; the engine itself has failed its requests."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.request_stop, 1)

    def _names_of(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        """For the scrape: a store that cannot be read costs the names, not the metrics."""
        built = self._built
        if built is None:
            return {}
        try:
            return built.services.registry.names(digests)
        except AdapterError:
            return {}

    def _existing(self, digests: Collection[str]) -> Collection[str]:
        """As `_names_of`: what cannot be looked up is taken to be there."""
        built = self._built
        if built is None:
            return digests
        try:
            return built.services.registry.existing(digests)
        except AdapterError:
            return digests

    def _read_adapters(self) -> AdapterReading:
        built = self._built
        return AdapterReading() if built is None else built.reading()


def serve(config: ServeConfig) -> NoReturn:
    """Be a server until SIGTERM, SIGINT or SIGHUP, then end the process: 0, or 1 when the engine died. A second
    SIGTERM or SIGINT ends it at once.

    Raises StartError, before torch is imported where it can be known: also when another process has the data directory.
    """
    configure_logs(config.log_level, config.log_format)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for people, logs are not
    with _store_errors_at_start():
        if config.data_dir == default_data_dir() and (former := move_former(config.data_dir)):
            print(f"moved {former} to {config.data_dir}: the project was renamed", flush=True)
        check_start(config)
        lock = DirectoryLock(config.data_dir)  # before a base is loaded that could not be served then
    try:
        asyncio.run(_serve(config, lock))  # ends the process itself
    finally:
        lock.release()


@contextmanager
def _store_errors_at_start() -> Iterator[None]:
    """A data directory that cannot be used stops a start as a port in use does."""
    try:
        yield
    except AdapterError as error:
        raise StartError(error.message, remedy=error.remedy) from error


async def _serve(config: ServeConfig, lock: DirectoryLock) -> NoReturn:
    app = App(config, lock=lock, ends_process=True)
    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(app.start())
    signals = 0

    def on_signal(number: int) -> None:
        nonlocal signals
        # A terminal that closes sends SIGHUP beside another signal, or twice, in any order: no reason to hurry.
        signals += number != signal.SIGHUP
        if signals > 1:
            _LOG.warning("stopping at once", extra={"fields": {"signal": number}})
            os._exit(128 + number)
        starting.cancel()
        app.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            loop.add_signal_handler(number, on_signal, number)
    where = f"gRPC on {config.listen} answers health with NOT_SERVING until ready"
    print(f"loading {config.model} ... ({where})", flush=True)
    try:
        with _store_errors_at_start():
            await starting
    except asyncio.CancelledError:
        _leave(0)
    for key, value in app.describe().items():
        print(f"  {key:<12} {value}", flush=True)
    print("ready", flush=True)
    _leave(await app.serve())


def _leave(code: int) -> NoReturn:
    """End here: streams have ended, the store is closed. The interpreter's own end would only free memory, for over a
    second with torch in it, and would wait for a base that is still being loaded; the event loop's would stop gRPC.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
    os._exit(code)


def _describe_weights(counts: WeightCounts) -> str:
    text = f"{counts.nf4_share:.0%} in NF4"
    if counts.experts:
        text += f"; {counts.experts / 1e6:,.1f} million of the experts' stay unquantized: they are fused"
    return text


def _describe_rope(limits: ServerLimits) -> str:
    if limits.original_context_tokens is None or limits.context_tokens <= limits.original_context_tokens:
        return ""
    return (
        f"; requests that may grow beyond {limits.original_context_tokens} (prompt and max_tokens) use LongRoPE's long "
        "factors throughout, others the short ones, as in training"
    )


_LABELS = ("model", "fingerprint", "device", "dtype")


async def _in_daemon_thread(work: Callable[[], ServerRuntime]) -> ServerRuntime:
    """Loading a base cannot be interrupted, and must not hold up an exit: not the default executor."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[ServerRuntime] = loop.create_future()

    def settle(result: ServerRuntime | None, error: BaseException | None) -> None:
        if done.cancelled():
            if result is not None:
                result.close()
        elif result is not None:
            done.set_result(result)
        else:
            done.set_exception(error or StartError("nothing was built", remedy="report this"))

    def run() -> None:
        result: ServerRuntime | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:  # the loop has ended
            return

    threading.Thread(target=run, name="loramux-build", daemon=True).start()
    return await done


async def _warm_up(services: Services, seconds: float) -> None:
    """One token of the base through the whole road: what is compiled or allocated lazily is so now."""
    stop = StopConditions(ignore_eos=True)
    submission = Submission("warm-up", _TENANT, None, (0,), SamplingParams(temperature=0.0), stop, max_tokens=1)
    try:
        async with asyncio.timeout(seconds), services.engine.submit(submission) as stream:
            async for event in stream:
                if event.failure is not None:
                    raise StartError(f"the warm-up step failed: {event.failure.message}", remedy="see the log")
    except TimeoutError:
        raise StartError(f"the warm-up step took over {seconds:g} s", remedy="raise --step-timeout-seconds") from None


def _tenant_of(context: Any) -> str:
    """All callers are one tenant until credentials distinguish them."""
    return _TENANT

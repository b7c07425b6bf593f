"""Puts a server's inside together: store, base, adapter pool, runner, engine, text. The only importer of torch code
outside `model`.

Everything is made here once and handed on; nothing here runs afterwards but `close` and the readings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from loramux_adapters.adapter_files import MAX_FILE_BYTES
from loramux_adapters.apply.inject import AdaptedModel, inject, rank_row_bytes
from loramux_adapters.apply.merge import merged_bytes
from loramux_adapters.apply.merged_rows import measure_merged_rows
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.frozen import Nf4Linear
from loramux_adapters.base.load import BaseRefused, LoadedBase, load_base
from loramux_adapters.base.source import explain_load
from loramux_adapters.base.weight_counts import count_weights, is_mixture
from loramux_adapters.base.weight_formats import select_weight_formats
from loramux_adapters.combining import combine
from loramux_adapters.device import DeviceRefused, best_dtype, check_dtype, select_device
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.errors import AdapterError
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.guard.exactness import ask_untouched
from loramux_adapters.guard.examine import Examined, examine, refusals_of
from loramux_adapters.kernels.select import select_kernels
from loramux_adapters.residency.frequency import Frequency
from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.pool import AdapterPool
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.lock import DirectoryLock
from loramux_adapters.store.records import Quotas
from loramux_adapters.weights import AdapterWeights
from loramux_server.adapter_loader import AdapterLoader, CombinationLoader, LendingLoader
from loramux_server.adapter_states import AdapterStateView
from loramux_server.api.gate import Services
from loramux_server.api.ports import ModelInfo
from loramux_server.api.server_limits import ServerLimits
from loramux_server.certification import Certifier, ServedBase
from loramux_server.combinations import Combinations
from loramux_server.config import EMBEDDED_MODEL, ServeConfig
from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.mailbox import Mailbox
from loramux_server.engine.scheduler import Scheduler
from loramux_server.errors import StartError
from loramux_server.merge_trials import MergeTrials
from loramux_server.model.cache import PagedCache, bytes_per_token
from loramux_server.model.decode_attention import select_decode
from loramux_server.model.guard import self_check
from loramux_server.model.merged_weights import MergedWeightsCache
from loramux_server.model.merging import Merges
from loramux_server.model.runner import ModelRunner, RunnerConfig
from loramux_server.model.sizing import Memory
from loramux_server.model.staging import StagedAdapters
from loramux_server.model.verification import Verification
from loramux_server.model.worker import Worker
from loramux_server.observe.metrics import AdapterReading
from loramux_server.registry import Registry
from loramux_server.runtime import EngineCallbacks, ServerRuntime
from loramux_server.text.adapter_text import AdapterTexts
from loramux_server.text.tokenizer import TextTokenizer

_LOG = logging.getLogger("loramux_server.assembly")
_EXTRA_SHARE = 4  # one part in 4 of the device budget is for what is no rank row, where the operator says nothing
_MAX_SLOTS = 4096
MAX_ROWS_OF_RANK = 8


def assemble(config: ServeConfig, hooks: EngineCallbacks, lock: DirectoryLock | None = None) -> ServerRuntime:
    """Everything `app` starts; `lock` as `Build` says. Raises StartError and whatever the store refuses with."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    store = LocalStore(config.data_dir, _quotas(config), lock=lock)
    try:
        return _assemble(config, hooks, store)
    except BaseException:
        store.close()
        raise


def _assemble(config: ServeConfig, hooks: EngineCallbacks, store: LocalStore) -> ServerRuntime:
    source = str(tiny_path()) if config.model == EMBEDDED_MODEL else config.model
    base = _load(config, source)
    context = min(config.context_tokens or base.spec.context_length, base.spec.context_length)
    with _loading(config):
        tokenizer = TextTokenizer.load(source, revision=config.revision)
    _check_determinism(config, base)
    kernels = select_kernels(deterministic=config.deterministic, device=base.device, dtype=base.compute_dtype)
    with _refused():
        examined = examine(base, context)
        adapted, cache, memory = _prepare(config, base, examined, context)
    capacity = adapted.capacity
    limits = ReadLimits(max_rank=min(config.max_rank, capacity), max_bytes=config.max_adapter_bytes)
    texts = AdapterTexts(tokenizer, limits)

    def read(files: Mapping[str, Path], *, allow_base_mismatch: bool) -> AdapterWeights:
        return formats.read(files, base.spec, limits, allow_base_mismatch=allow_base_mismatch)

    merged_rows = measure_merged_rows(adapted) if config.merged_bytes and not config.deterministic else None
    engine_limits = _engine_limits(config, cache, examined, merged_rows)
    mailbox = Mailbox(engine_limits.max_live)
    combinations = Combinations(most_rank=capacity, most_bytes=config.max_adapter_bytes)
    stored = LendingLoader(AdapterLoader(store, read, base.spec.fingerprint).load)
    host = _host_cache(config, stored.load, combinations, base)
    loader = ThreadPoolExecutor(1, "loramux-loader")
    staged, merges = StagedAdapters(SlotTensors(adapted), mailbox.notify), Merges(adapted)
    pool = AdapterPool(
        SlotTable(adapted.linears, capacity, _MAX_SLOTS, _extra_bytes(config, memory)),
        staged,
        host,
        loader,
        mailbox.notify,
        frequency=Frequency() if config.adapter_eviction == "frequency" else None,
    )
    client = EngineClient(mailbox, engine_limits, loop=hooks.loop, observer=hooks.metrics)
    certifier = Certifier(client, _served_base(base, tokenizer, context))
    trials = MergeTrials(certifier, host.load, store.certificate, hooks.loop)
    cost = partial(merged_bytes, adapted)
    refusal = "merged weights are off in deterministic mode: their rounding differs" if config.deterministic else ""
    merged_weights = MergedWeightsCache(
        merges, cost, host.load, mailbox.notify, config.merged_bytes, refusal, try_out=trials.begin
    )
    runner = ModelRunner(adapted, cache, kernels, RunnerConfig(config.deterministic, examined.rope))
    scheduler = Scheduler(engine_limits, pool, merged_weights)
    worker = Worker(runner, staged, merges, Verification(adapted))
    engine = Engine(scheduler, worker, mailbox, client, observer=hooks.metrics, on_death=hooks.on_death)
    states = AdapterStateView(pool, host, merged_weights, stored)
    registry = Registry(
        store,
        read,
        base.spec.fingerprint,
        states,
        combinations=combinations,
        check_texts=texts.check,
        replay=certifier.replay,
    )
    info = _model_info(config, base, context, engine_limits, limits, memory)

    def close() -> None:
        loader.shutdown(wait=True, cancel_futures=True)
        merged_weights.close()
        registry.close()
        texts.close()

    services = Services(client, registry, tokenizer, info, states, texts)
    return ServerRuntime(services, engine, lambda: _read(pool, host, merged_weights, registry), close)


def _check_determinism(config: ServeConfig, base: LoadedBase) -> None:
    if config.deterministic and is_mixture(base.config):
        raise StartError(
            f"{base.spec.architecture} is a mixture of experts: the products of an expert depend on how many tokens "
            "of a step are routed to it, so --deterministic cannot be kept",
            remedy="serve it without --deterministic",
        )


def _served_base(base: LoadedBase, tokenizer: TextTokenizer, context: int) -> ServedBase:
    """What a certificate is compared with."""
    return ServedBase(
        base.spec.fingerprint,
        tokenizer.template_digest,
        str(base.compute_dtype).removeprefix("torch."),
        base.spec.vocab_size,
        base.spec.context_length,
        context,
    )


def _host_cache(
    config: ServeConfig, stored: Callable[[str], AdapterWeights], combinations: Combinations, base: LoadedBase
) -> HostCache[AdapterWeights]:
    """Over the store, and over itself for what is combined of several adapters."""
    frequency = Frequency() if config.adapter_eviction == "frequency" else None
    load = CombinationLoader(
        combinations.find, lambda digest: host.load(digest), stored, partial(combine, base=base.spec)
    ).load
    host = HostCache(load, config.adapter_host_bytes, frequency)
    return host


def _engine_limits(config: ServeConfig, cache: PagedCache, examined: Examined, merged_rows: int | None) -> EngineLimits:
    try:
        return EngineLimits(
            kv_blocks=cache.blocks - 1,  # the last one is scratch
            block_tokens=cache.block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_queued=config.max_queued,
            prefix_cache=config.prefix_cache,
            deterministic=config.deterministic,
            original_context=None if examined.rope is None else examined.rope.original_context,
            merged_rows=merged_rows,
        )
    except ValueError as error:
        raise StartError(str(error), remedy="change the options it names") from error


def _extra_bytes(config: ServeConfig, memory: Memory) -> int:
    """Of the adapters' device bytes, those for what is no rank row."""
    if config.adapter_extra_bytes is not None:
        return min(config.adapter_extra_bytes, memory.adapters)
    return memory.adapters // _EXTRA_SHARE


def _quotas(config: ServeConfig) -> Quotas:
    return Quotas(
        max_adapters=config.max_adapters,
        max_bytes=config.max_store_bytes,
        max_upload_bytes=config.max_adapter_bytes + sum(filter(None, MAX_FILE_BYTES.values())),  # and what is beside it
        max_open_uploads=config.max_uploads,
        upload_ttl_seconds=config.upload_ttl_seconds,
    )


def _load(config: ServeConfig, source: str) -> LoadedBase:
    try:
        device = select_device(config.device)
        with _loading(config):
            return load_base(
                source,
                compute_dtype=_compute_dtype(config.dtype, device),
                device=device,
                double_quant=config.double_quant,
                revision=config.revision,
            )
    except (BaseRefused, DeviceRefused) as error:
        raise StartError(str(error), remedy="see `loramux doctor`") from error


@contextmanager
def _loading(config: ServeConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        explained = explain_load(config.model, error, os.environ)
        raise StartError(f"model: {explained}", remedy=explained.remedy) from error


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise StartError(f"{name} is no dtype", remedy="use auto, float32, bfloat16 or float16")
        check_dtype(device, dtype)
        return dtype
    return best_dtype(device)


def _prepare(
    config: ServeConfig, base: LoadedBase, examined: Examined, context: int
) -> tuple[AdaptedModel, PagedCache, Memory]:
    """Injects places for adapters and allocates the KV cache, both sized from what is free."""
    row_bytes = rank_row_bytes(base.spec, base.compute_dtype)
    token_bytes = bytes_per_token(examined.layers, base.compute_dtype)
    weights = [m.in_features * m.out_features for m in base.spec.modules.values() if m.kind in ("linear", "conv1d")]
    memory = Memory.plan(
        base.device,
        kv_bytes=config.kv_bytes,
        kv_most=token_bytes * context * config.max_running,
        adapter_bytes=config.adapter_device_bytes,
        rank_row_bytes=row_bytes,
        dense_base_bytes=config.dense_base_bytes,
        dense_needed=sum(weights) * base.compute_dtype.itemsize,
    )
    capacity = (memory.adapters - _extra_bytes(config, memory)) // row_bytes // MAX_ROWS_OF_RANK * MAX_ROWS_OF_RANK
    if capacity < MAX_ROWS_OF_RANK:
        raise StartError(
            f"{memory.adapters - _extra_bytes(config, memory)} bytes hold no adapter of rank {MAX_ROWS_OF_RANK} here",
            remedy=f"set --adapter-device-bytes to {row_bytes * MAX_ROWS_OF_RANK * 2} or more",
        )
    blocks = memory.kv // (token_bytes * config.block_tokens)
    if blocks < 2:
        raise StartError(
            f"{memory.kv} bytes hold no KV cache of two blocks",
            remedy=f"set --kv-bytes to {token_bytes * config.block_tokens * 4} or more",
        )
    with refusals_of(base):
        truth = ask_untouched(
            base, examined.layers, context, room=blocks * config.block_tokens, block=config.block_tokens
        )
    weight_formats = select_weight_formats(
        base.device, base.compute_dtype, dense=memory.dense_base, invariant=config.deterministic
    )
    adapted = inject(base, capacity=capacity, weight_formats=weight_formats)
    rounding = max((g.frozen.packing_error for g in adapted.groups if isinstance(g.frozen, Nf4Linear)), default=0.0)
    if rounding:
        _LOG.warning("the packed layout rounds block scales", extra={"fields": {"largest_relative_error": rounding}})
    cache = PagedCache(examined.layers, int(blocks) + 1, config.block_tokens, base.compute_dtype, base.device)
    decode = select_decode(base.device, base.compute_dtype)
    error = self_check(adapted, cache, truth, rope=examined.rope, decode=decode, tiled=config.deterministic)
    _LOG.info("packed steps equal the untouched model", extra={"fields": {"largest_relative_error": f"{error:.2g}"}})
    return adapted, cache, memory


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except BaseRefused as refusal:
        remedy = "serve another base; docs/models.md lists the architectures that are served exactly"
        raise StartError(str(refusal), remedy=remedy) from refusal


def _model_info(
    config: ServeConfig,
    base: LoadedBase,
    context: int,
    engine: EngineLimits,
    read: ReadLimits,
    memory: Memory,
) -> ModelInfo:
    return ModelInfo(
        model_id=base.spec.model_id,
        architecture=base.spec.architecture,
        fingerprint=base.spec.fingerprint,
        compute_dtype=str(base.compute_dtype).removeprefix("torch."),
        device=str(base.device),
        deterministic=config.deterministic,
        limits=ServerLimits(
            context_tokens=context,
            max_batch_tokens=engine.max_batch_tokens,
            max_running=engine.max_running,
            max_queued=engine.max_queued,
            kv_tokens=engine.kv_tokens,
            max_rank=read.max_rank,
            max_adapter_bytes=read.max_bytes,
            adapter_device_bytes=memory.adapters,
            vocabulary=base.spec.vocab_size,
            max_choices=min(config.max_choices, engine.max_live),
            max_logprobs=config.max_logprobs,
            max_stop_strings=config.max_stop_strings,
            original_context_tokens=engine.original_context,
        ),
        weights=count_weights(base.spec),
    )


def _read(
    pool: AdapterPool[AdapterWeights],
    host: HostCache[AdapterWeights],
    merged: MergedWeightsCache,
    registry: Registry,
) -> AdapterReading:
    stats = pool.stats()
    ready, dense_bytes, builds = merged.usage()
    return AdapterReading(
        tiers={
            "resident": (stats.resident, stats.resident_bytes),
            "loaded": host.usage,
            **_registered(registry),
        },
        leases=stats.leases,
        pinned=stats.pinned,
        loads_total={"ok": stats.loads, "failed": stats.load_failures},
        load_seconds_total=stats.load_seconds,
        evictions_total={"resident": stats.evictions},
        hits_total=stats.hits,
        lease_waits_total=stats.waits,
        merged_adapters=ready,
        merged_bytes=dense_bytes,
        merges_total=builds,
        slots=stats.rows_capacity // MAX_ROWS_OF_RANK,
    )


def _registered(registry: Registry) -> dict[str, tuple[int, int]]:
    """A store that cannot be read costs its own series, not the others."""
    try:
        return {"registered": registry.usage()}
    except AdapterError:
        return {}

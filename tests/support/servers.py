"""Servers for tests: a real App over the fake runner in this process, and `loramux serve` as a process.

Both on free ports of 127.0.0.1 with a store of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.spec import AdapterSpec, WeightCounts
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.lock import DirectoryLock
from loramux_adapters.store.records import DesiredState, Quotas
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from loramux_server.api.gate import Services
from loramux_server.api.ports import AdapterState, ModelInfo
from loramux_server.api.server_limits import ServerLimits
from loramux_server.app import App
from loramux_server.config import ServeConfig, resolve_config
from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.limits import EngineLimits
from loramux_server.engine.mailbox import Mailbox
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.scheduler import Scheduler
from loramux_server.observe.metrics import AdapterReading
from loramux_server.publishing import ReadAdapter
from loramux_server.registry import Registry
from loramux_server.requests import RequestFailure
from loramux_server.runtime import EngineCallbacks, ServerRuntime
from support.fake_pool import FakePool
from support.fake_runner import VOCABULARY, FakeRunner
from support.stores import FakeWeights

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 ."
EOS = 63  # "."
BASE = "f" * 64
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class FakeTokenizer:
    """One token a character of ALPHABET; a chat is its contents with a space between."""

    template_digest = "0" * 64
    waits = False
    longest_token = 8
    takes_tools = False
    eos_token_ids = frozenset({EOS})
    special_tokens: Mapping[str, int] = MappingProxyType({"<|end|>": EOS})

    def encode(self, text: str) -> list[int]:
        """Characters that are not in the alphabet become spaces."""
        return [ALPHABET.find(char) if char in ALPHABET else 62 for char in text]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        most_characters: int | None = None,
    ) -> list[int]:
        """Refuses a role "tool", as templates do."""
        if any(message["role"] == "tool" for message in messages):
            raise ValueError("no role tool")
        return self.encode(" ".join(message["content"] for message in messages))

    def decode(self, ids: Sequence[int]) -> str:
        """The end-of-text token is left out, as special tokens are, and so are ids without a token."""
        return "".join(ALPHABET[token] for token in ids if token < EOS)

    def output_context(self, prompt: Sequence[int]) -> list[int]:
        """The whole prompt."""
        return list(prompt)

    def token_bytes(self, token: int) -> bytes:
        """Of one token."""
        return ALPHABET[token : token + 1].encode()


class FakeStates:
    """Where adapters are: as a test says, or else as is desired, at once. Also the registry's AdapterCaches."""

    def __init__(self) -> None:
        self.known: dict[str, AdapterState] = {}
        self.desired = DesiredState()

    def state(self, digest: str) -> AdapterState:
        """What a test knows better goes first."""
        desired = AdapterState(
            "resident" if digest in self.desired.pinned else "registered",
            merged="ready" if digest in self.desired.merged else "none",
        )
        return self.known.get(digest, desired)

    def reconcile(self, desired: DesiredState, retry: str | None = None) -> None:
        """See `publishing.AdapterCaches`."""
        self.desired = desired

    def offer(self, weights: Weights) -> None:
        """See `publishing.AdapterCaches`."""

    def lend(self, weights: Weights) -> AbstractContextManager[None]:
        """See `publishing.AdapterCaches`."""
        return nullcontext()

    def evict(self, digest: str) -> None:
        """See `publishing.AdapterCaches`."""


def read_fake_adapter(files: Mapping[str, Path], *, allow_base_mismatch: bool) -> FakeWeights:
    """An adapter is any bytes but those that begin with `bad`; its digest is theirs."""
    data = files[WEIGHTS_FILE].read_bytes()
    if data.startswith(b"bad"):
        raise AdapterInvalid("the weights are bad", subject=WEIGHTS_FILE)
    digest = hashlib.sha256(data).hexdigest()
    ranks = {"layers.0.q_proj": 4}
    return FakeWeights(AdapterSpec(digest, "lora", None, allow_base_mismatch, ranks, frozenset(), len(data)))


@dataclass
class Inside:
    """The fake inside of an App, with the handles a test turns. `before_step` may sleep, raise or fail requests."""

    context_tokens: int = 128
    kv_blocks: int = 64
    before_step: Callable[[StepPlan], Mapping[str, RequestFailure] | None] | None = None
    build_seconds: float = 0.0
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    states: FakeStates = field(default_factory=FakeStates)
    pool: FakePool = field(default_factory=lambda: FakePool(4, at_once=True))
    read: ReadAdapter = read_fake_adapter
    runner: FakeRunner = field(init=False)
    scheduler: Scheduler = field(init=False)
    client: EngineClient = field(init=False)
    registry: Registry = field(init=False)

    def build(self, config: ServeConfig, hooks: EngineCallbacks, lock: DirectoryLock | None = None) -> ServerRuntime:
        """An App's `Build`."""
        time.sleep(self.build_seconds)
        bounds = EngineLimits(
            self.kv_blocks,
            block_tokens=4,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_queued=config.max_queued,
        )
        store = LocalStore(config.data_dir, Quotas(max_adapters=config.max_adapters), lock=lock)
        self.registry = Registry(store, self.read, BASE, self.states)
        self.scheduler = Scheduler(bounds, self.pool)
        self.runner = FakeRunner(4, self.pool.digest_of, self._inject)
        mailbox = Mailbox(bounds.max_live)
        self.client = EngineClient(mailbox, bounds, loop=hooks.loop, observer=hooks.metrics)
        engine = Engine(
            self.scheduler, self.runner, mailbox, self.client, observer=hooks.metrics, on_death=hooks.on_death
        )
        limits = ServerLimits(
            context_tokens=self.context_tokens,
            max_batch_tokens=bounds.max_batch_tokens,
            max_running=bounds.max_running,
            max_queued=bounds.max_queued,
            kv_tokens=bounds.kv_tokens,
            max_rank=config.max_rank,
            max_adapter_bytes=config.max_adapter_bytes,
            adapter_device_bytes=1 << 20,
            vocabulary=VOCABULARY,
            max_choices=config.max_choices,
            max_logprobs=config.max_logprobs,
            max_stop_strings=config.max_stop_strings,
        )
        model = ModelInfo("fake", "llama", BASE, "float32", "cpu", False, limits, WeightCounts(0, 0, 0))
        services = Services(self.client, self.registry, self.tokenizer, model, self.states)
        return ServerRuntime(services, engine, lambda: AdapterReading(slots=4), self.registry.close)

    @property
    def is_idle(self) -> bool:
        """Whether no request, block or lease is held."""
        load = self.scheduler.load()
        return self.scheduler.is_idle and load.kv_blocks_held == 0 and self.pool.leased == 0

    def _inject(self, plan: StepPlan) -> Mapping[str, RequestFailure]:
        return (self.before_step(plan) if self.before_step else None) or {}


@dataclass
class Served:
    """A running App and a channel to it."""

    app: App
    inside: Inside
    channel: aio.Channel

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        """Stub of InferenceService."""
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def adapters(self) -> adapters_pb2_grpc.AdapterServiceAsyncStub:
        """Stub of AdapterService."""
        return adapters_pb2_grpc.AdapterServiceStub(self.channel)


def serve_config(data_dir: Path, **flags: object) -> ServeConfig:
    """Small, on free ports, quick to stop."""
    return resolve_config(
        flags={
            "listen": "127.0.0.1:0",
            "metrics_listen": "none",
            "data_dir": data_dir,
            "max_running": 8,
            "max_queued": 16,
            "max_batch_tokens": 64,
            "readiness_seconds": 0,
            "drain_seconds": 2,
            **flags,
        }
    ).config


@asynccontextmanager
async def served(data_dir: Path, inside: Inside | None = None, **flags: object) -> AsyncIterator[Served]:
    """A started App over the fake inside; stopped on leaving."""
    inside = inside or Inside()
    app = App(serve_config(data_dir, **flags), inside.build)
    await app.start()
    try:
        async with aio.insecure_channel(app.address) as channel:
            yield Served(app, inside, channel)
    finally:
        await app.stop()


def manifest(files: Mapping[str, bytes]) -> list[adapters_pb2.FileEntry]:
    """What `begin` says of `files`."""
    return [
        adapters_pb2.FileEntry(file=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]


def upload_messages(
    name: str, files: Mapping[str, bytes], upload_id: str = "upload-1", chunk: int = 1 << 16, **more: Any
) -> list[adapters_pb2.UploadAdapterRequest]:
    """A whole upload: begin, with `more` fields, chunks, commit."""
    begin = adapters_pb2.UploadBegin(upload_id=upload_id, name=name, manifest=manifest(files), **more)
    messages = [adapters_pb2.UploadAdapterRequest(begin=begin)]
    for file, data in files.items():
        for offset in range(0, len(data), chunk):
            part = adapters_pb2.UploadChunk(file=file, offset=offset, data=data[offset : offset + chunk])
            messages.append(adapters_pb2.UploadAdapterRequest(chunk=part))
    return [*messages, adapters_pb2.UploadAdapterRequest(commit=adapters_pb2.UploadCommit())]


def adapter_files(content: bytes = b"weights") -> dict[str, bytes]:
    """Files of a fake adapter."""
    return {CONFIG_FILE: b"{}", WEIGHTS_FILE: content}


def details(error: aio.AioRpcError) -> dict[str, Any]:
    """The rich details of a failed call by message name, and `code`."""
    found: dict[str, Any] = {"code": error.code()}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0]
            for packed in status.details:
                kind = packed.type_url.rpartition(".")[2]
                message = getattr(error_details_pb2, kind)()
                packed.Unpack(message)
                found[kind] = message
        elif key == "grpc-retry-pushback-ms":
            found["pushback"] = int(value)
    return found


def prompt_request(text: str = "Hello", max_tokens: int = 4, **more: Any) -> inference_pb2.GenerateRequest:
    """A greedy request that runs its whole length."""
    request = inference_pb2.GenerateRequest(text=text, **more)
    if not request.sampling.HasField("temperature"):
        request.sampling.temperature = 0.0
    if not request.sampling.HasField("seed"):
        request.sampling.seed = 7
    request.stopping.max_tokens = max_tokens
    request.stopping.ignore_eos = True
    return request


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what another task or thread brings about. TimeoutError when it does not."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- the condition is a state of another thread, not an event
            await asyncio.sleep(0.005)

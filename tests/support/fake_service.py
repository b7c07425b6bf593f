"""A Loramux server of a few dozen lines for the client's tests: adapters in a dict, answers by echo.

Keeps the protocol's promises that a client relies on (resume, commit, rich errors) and can be told to break them.
"""

# ruff: noqa: N802  (gRPC names the methods)
from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from loramux_protos.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
)

DIGEST = "d" * 64
BASE = "b" * 64


MAX_CHOICES = 4


@dataclass
class Faults:
    """What goes wrong, once each: counts are used up."""

    unavailable_calls: int = 0  # next calls of anything: UNAVAILABLE with RetryInfo
    unavailable_reason: str = "UNAVAILABLE"
    retry_after: float = 0.01
    cut_upload_after: int | None = None  # bytes of one upload, then UNAVAILABLE
    corrupt_download: bool = False
    download_name: str | None = None  # sent in place of a file's name
    fail_stream_after: int | None = None  # messages of one stream, then INTERNAL
    finish: inference_pb2.FinishReason.ValueType | None = None  # of every choice
    empty: bool = False  # every choice ends before its first token


@dataclass
class Upload:
    """A staged upload."""

    name: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    data: dict[str, bytearray]
    begin: adapters_pb2.UploadBegin


@dataclass
class State:
    """What the fake knows; tests read it."""

    faults: Faults = field(default_factory=Faults)
    uploads: dict[str, Upload] = field(default_factory=dict)
    adapters: dict[str, adapters_pb2.Adapter] = field(default_factory=dict)
    keeps_sets: bool = False  # another name desires every merge too
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    calls: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: Any) -> NoReturn:
    """Abort with google.rpc.Status."""
    packed = []
    for detail in details:
        entry = any_pb2.Any()
        entry.Pack(detail)
        packed.append(entry)
    context.abort_with_status(
        rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))
    )
    raise RuntimeError("abort returns never")


def _enter(state: State, context: grpc.ServicerContext) -> None:
    state.calls += 1
    if state.faults.unavailable_calls > 0:
        state.faults.unavailable_calls -= 1
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(state.faults.retry_after * 1000))
        refuse(
            context,
            grpc.StatusCode.UNAVAILABLE,
            "the server is not ready",
            error_details_pb2.ErrorInfo(reason=state.faults.unavailable_reason, domain="loramux"),
            error_details_pb2.RetryInfo(retry_delay=delay),
        )


def _no_adapter(context: grpc.ServicerContext, name: str) -> NoReturn:
    refuse(
        context,
        grpc.StatusCode.NOT_FOUND,
        f"no adapter {name!r}",
        error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="loramux"),
        error_details_pb2.ResourceInfo(resource_type="adapter", resource_name=name),
    )


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, state: State) -> None:
        self._state = state

    def _check(self, request: inference_pb2.GenerateRequest, context: Any) -> str:
        _enter(self._state, context)
        self._state.requests.append(request)
        if request.adapter and request.adapter not in self._state.adapters:
            _no_adapter(context, request.adapter)
        if request.sampling.n > MAX_CHOICES:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field="sampling.n", description=f"must be at most {MAX_CHOICES}"
            )
            refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"sampling.n: must be at most {MAX_CHOICES}",
                error_details_pb2.ErrorInfo(
                    reason="INVALID_REQUEST", domain="loramux", metadata={"max_choices": str(MAX_CHOICES)}
                ),
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        kind = request.WhichOneof("input")
        if kind == "chat":
            return " ".join(message.content for message in request.chat.messages)
        return request.text if kind == "text" else " ".join(map(str, request.token_ids.ids))

    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> inference_pb2.GenerateResponse:
        text = self._check(request, context)
        is_empty = self._state.faults.empty
        usage = common_pb2.Usage(prompt_tokens=len(text), completion_tokens=0 if is_empty else 1, cached_tokens=0)
        return inference_pb2.GenerateResponse(
            prompt=inference_pb2.PromptInfo(
                request_id=request.request_id or "made-up", adapter_digest=DIGEST if request.adapter else "", seed=7
            ),
            choices=[
                inference_pb2.Choice(
                    index=i,
                    text="" if is_empty else f"{request.adapter or 'base'}: {text}",
                    token_ids=[1, 2],
                    logprobs=[
                        inference_pb2.TokenLogprob(
                            token_id=1,
                            logprob=-0.5,
                            text=b"a",
                            alternatives=[inference_pb2.TokenAlternative(token_id=2, logprob=-1.0, text=b"\xff")],
                        )
                    ],
                    finish=inference_pb2.Finish(
                        reason=self._state.faults.finish or inference_pb2.FINISH_REASON_STOP,
                        stop_string="\n",
                        usage=usage,
                    ),
                )
                for i in range(request.sampling.n or 1)
            ],
        )

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        text = self._check(request, context)
        context.add_callback(self._state.cancelled.set)
        if self._state.faults.empty:
            yield inference_pb2.GenerateStreamResponse(
                finish=inference_pb2.Finish(reason=self._state.faults.finish or inference_pb2.FINISH_REASON_STOP)
            )
            return
        words = text.split(" ")
        fail_after, self._state.faults.fail_stream_after = self._state.faults.fail_stream_after, None
        for number, word in enumerate(words):
            if number == fail_after:
                refuse(context, grpc.StatusCode.INTERNAL, "internal error, request abc")
            last = number == len(words) - 1
            response = inference_pb2.GenerateStreamResponse(
                text=word if number == 0 else f" {word}", token_ids=[number]
            )
            if number == 0:
                response.prompt.request_id = request.request_id or "made-up"
            if last:
                response.finish.reason = self._state.faults.finish or inference_pb2.FINISH_REASON_LENGTH
                response.finish.usage.completion_tokens = len(words)
            yield response

    def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        _enter(self._state, context)
        return inference_pb2.TokenizeResponse(token_ids=request.text.encode())

    def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> inference_pb2.DetokenizeResponse:
        _enter(self._state, context)
        return inference_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def GetModel(self, request: inference_pb2.GetModelRequest, context: Any) -> inference_pb2.GetModelResponse:
        _enter(self._state, context)
        return inference_pb2.GetModelResponse(
            model_id="fake",
            architecture="llama",
            fingerprint=BASE,
            limits=inference_pb2.Limits(context_tokens=64, max_rank=8),
        )

    def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        _enter(self._state, context)
        return inference_pb2.AbortResponse(aborted=request.request_id == "running")


class _Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, state: State) -> None:
        self._state = state

    def UploadAdapter(
        self, request_iterator: Iterator[adapters_pb2.UploadAdapterRequest], context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        _enter(self._state, context)
        upload: Upload | None = None
        received = 0
        for message in request_iterator:
            step = message.WhichOneof("step")
            if step == "begin":
                upload = self._begin(message.begin)
            elif step == "chunk" and upload is not None:
                file = upload.data[message.chunk.file]
                if message.chunk.offset != len(file):
                    refuse(context, grpc.StatusCode.OUT_OF_RANGE, f"the upload stands at {len(file)}")
                file += message.chunk.data
                received += len(message.chunk.data)
                cut = self._state.faults.cut_upload_after
                if cut is not None and received >= cut:
                    self._state.faults.cut_upload_after = None
                    refuse(context, grpc.StatusCode.UNAVAILABLE, "cut")
            elif step == "commit" and upload is not None:
                return self._commit(upload, context)
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "no commit")

    def _begin(self, begin: adapters_pb2.UploadBegin) -> Upload:
        fresh = Upload(
            begin.name,
            {entry.file: entry.size for entry in begin.manifest},
            {entry.file: entry.sha256 for entry in begin.manifest},
            {entry.file: bytearray() for entry in begin.manifest},
            begin,
        )
        return self._state.uploads.setdefault(begin.upload_id, fresh)

    def _commit(self, upload: Upload, context: Any) -> adapters_pb2.UploadAdapterResponse:
        for file, data in upload.data.items():
            if hashlib.sha256(data).hexdigest() != upload.hashes[file]:
                refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{file}: wrong sha256")
        files = {file: bytes(data) for file, data in upload.data.items()}
        created = self._state.files.get(upload.name) != files
        self._state.files[upload.name] = files
        adapter = self._state.adapters.setdefault(
            upload.name,
            adapters_pb2.Adapter(name=upload.name, digest=DIGEST, kind="lora", max_rank=4, targets=["q_proj"]),
        )
        adapter.size_bytes = sum(upload.sizes.values())
        self._end(adapter, upload.begin)
        adapter.health = adapters_pb2.ADAPTER_HEALTH_OK
        adapter.residency.tier = adapters_pb2.TIER_REGISTERED
        adapter.residency.merged = adapters_pb2.MERGED_STATE_NONE
        self._state.uploads = {key: value for key, value in self._state.uploads.items() if value is not upload}
        return adapters_pb2.UploadAdapterResponse(adapter=adapter, created=created)

    def _end(self, adapter: adapters_pb2.Adapter, begin: adapters_pb2.UploadBegin) -> None:
        for name in ("expires", "max_uses", "uses_left"):
            adapter.ClearField(name)
        if begin.HasField("ttl_seconds"):
            adapter.expires.FromMilliseconds(round((time.time() + begin.ttl_seconds) * 1000))
        if begin.HasField("max_uses"):
            adapter.max_uses = adapter.uses_left = begin.max_uses

    def QueryUpload(self, request: adapters_pb2.QueryUploadRequest, context: Any) -> adapters_pb2.QueryUploadResponse:
        upload = self._state.uploads.get(request.upload_id)
        if upload is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, "no such upload")
        return adapters_pb2.QueryUploadResponse(
            files=[
                adapters_pb2.FileProgress(file=file, received=len(data), size=upload.sizes[file])
                for file, data in upload.data.items()
            ]
        )

    def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        _enter(self._state, context)
        if request.adapter not in self._state.adapters:
            _no_adapter(context, request.adapter)
        return self._state.adapters[request.adapter]

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        _enter(self._state, context)
        names = sorted(self._state.adapters)
        first = int(request.page_token or 0)
        page = names[first : first + request.page_size]
        following = first + len(page)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self._state.adapters[name] for name in page],
            next_page_token=str(following) if following < len(names) else "",
        )

    def UpdateAdapter(self, request: adapters_pb2.UpdateAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        _enter(self._state, context)
        if request.name not in self._state.adapters:
            _no_adapter(context, request.name)
        adapter = self._state.adapters[request.name]
        if request.HasField("pinned"):
            adapter.pinned = request.pinned
        if request.HasField("merge"):
            adapter.merge = request.merge
            is_ready = request.merge or self._state.keeps_sets
            adapter.residency.merged = adapters_pb2.MERGED_STATE_READY if is_ready else adapters_pb2.MERGED_STATE_NONE
        aliases = {*adapter.aliases, *request.add_aliases} - set(request.remove_aliases)
        del adapter.aliases[:]
        adapter.aliases.extend(sorted(aliases))
        for key, value in request.set_labels.items():
            adapter.labels[key] = value
        for key in request.remove_labels:
            adapter.labels.pop(key)
        return adapter

    def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        _enter(self._state, context)
        if self._state.adapters.pop(request.name, None) is None:
            _no_adapter(context, request.name)
        return adapters_pb2.DeleteAdapterResponse()

    def DownloadAdapter(
        self, request: adapters_pb2.DownloadAdapterRequest, context: Any
    ) -> Iterator[adapters_pb2.DownloadAdapterResponse]:
        _enter(self._state, context)
        if request.adapter not in self._state.files:
            _no_adapter(context, request.adapter)
        files = self._state.files[request.adapter]
        manifest = adapters_pb2.DownloadManifest(digest=DIGEST)
        for file, data in files.items():
            name = self._state.faults.download_name or file
            manifest.files.add(file=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        yield adapters_pb2.DownloadAdapterResponse(manifest=manifest)
        for file, data in files.items():
            sent = bytes([data[0] ^ 1]) + data[1:] if self._state.faults.corrupt_download else data
            for offset in range(0, len(sent), 1000):
                chunk = adapters_pb2.UploadChunk(file=file, offset=offset, data=sent[offset : offset + 1000])
                yield adapters_pb2.DownloadAdapterResponse(chunk=chunk)


@dataclass
class FakeServer:
    """A running fake."""

    address: str
    state: State
    health: Any

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers."""
        status = health_pb2.HealthCheckResponse
        self.health.set("", status.SERVING if serving else status.NOT_SERVING)


@contextmanager
def serve_fake(address: str = "127.0.0.1:0") -> Iterator[FakeServer]:
    """The fake on a free port of 127.0.0.1; healthy."""
    state = State()
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(state), server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(_Adapters(state), server)
    checker = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    port = server.add_insecure_port(address)
    server.start()
    fake = FakeServer(f"127.0.0.1:{port}", state, checker)
    fake.set_serving(True)
    try:
        yield fake
    finally:
        server.stop(None).wait()

"""The asyncio client: one channel, typed answers, bounded retries. Files are read and written off the loop.

The source of both clients: `make client` writes the synchronous one, `client`, from this. Knows neither torch nor the
server's code; what differs between the two beside the waiting is in `transport_aio` and `transport`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux import convert, upload
from loramux.channel import CALL_TIMEOUT, DEFAULT_ADDRESS
from loramux.download import Download
from loramux.errors import (
    ClientClosed,
    DeadlineExceeded,
    LoramuxError,
    NotFound,
    Unavailable,
)
from loramux.retry import Attempts, RetryPolicy
from loramux.transport_aio import CallError, Method, open_channel, read_error, run_blocking, send_all, sleep
from loramux.types import (
    Adapter,
    AdapterChanges,
    FileProgress,
    GenerateOptions,
    Generation,
    Messages,
    ModelInfo,
    ProgressCallback,
    Pulled,
    Pushed,
    StreamPart,
)
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class AsyncClient:
    """A connection to a Loramux server at `address` ("host:port"); use with `async with` or `await close()` it.

    Make it inside a running event loop. Every method raises a `loramux.errors.LoramuxError`. A `timeout` is seconds for
    the whole call, repeats included.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.address = address
        self._retry = retry or RetryPolicy()
        self._closed = False
        self._channel = open_channel(address, credentials)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End running calls and close the channel; calls after it raise ClientClosed."""
        self._closed = True
        await self._channel.close()

    # Inference

    async def generate(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        adapter: str | Mapping[str, float] = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer to exactly one of text, token_ids or messages.

        `adapter` is a reference, "" for the base, or several with their weights, which act as one.
        """
        request = convert.generate_request(text, token_ids, messages, adapter, options)
        attempts = Attempts(self._retry, timeout)
        return convert.generation(await self._call(self._inference.Generate, request, attempts))

    def stream(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        adapter: str | Mapping[str, float] = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[StreamPart, None]:
        """As `generate`, in parts as tokens are made. Closing the generator cancels the request."""
        return self._stream(convert.generate_request(text, token_ids, messages, adapter, options), timeout)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        adapter: str = "",
    ) -> tuple[int, ...]:
        """Token ids of a text (with special tokens) or of a chat in the model's template, or in an adapter's own."""
        request = convert.tokenize_request(text, messages, tools, adapter)
        response = await self._call(self._inference.Tokenize, request, idempotent=True)
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, adapter: str = "") -> str:
        """Text of token ids, by the base's tokenizer or an adapter's own."""
        request = convert.detokenize_request(token_ids, adapter)
        response = await self._call(self._inference.Detokenize, request, idempotent=True)
        return response.text

    async def model(self) -> ModelInfo:
        """The base that the server holds, and its limits."""
        request = inference_pb2.GetModelRequest()
        return convert.model_info(await self._call(self._inference.GetModel, request, idempotent=True))

    async def abort(self, request_id: str) -> bool:
        """End a running or waiting request; False when there is none of that id."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        response = await self._call(self._inference.Abort, request, idempotent=True)
        return response.aborted

    # Adapters

    async def push(
        self,
        directory: str | PathLike[str],
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        allow_base_mismatch: bool = False,
        ttl: float | None = None,
        max_uses: int | None = None,
        if_version: str | None = None,
        tokenizer: bool = True,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Pushed:
        """Upload a directory of PEFT's or AdapterHub's as `name`; a repeat after a cut goes on where the server stands.

        The server removes the name `ttl` seconds after the push, and with the last of `max_uses` requests; those that
        were accepted end on their version. A name that stays is given no end, and a push without one takes it away.
        With `if_version` it is refused (FailedPrecondition) unless the name points at the version that starts so, or at
        this very content; empty: unless the name is new.
        Only the adapter's config, its safetensors, loramux.json and, unless `tokenizer` is off, its own tokenizer and
        chat template travel; `Pushed.left_out` lists the rest.
        `progress` is called from another thread.
        """
        bundle = await run_blocking(
            upload.collect,
            Path(directory),
            name,
            labels or {},
            allow_base_mismatch=allow_base_mismatch,
            ttl=ttl,
            max_uses=max_uses,
            if_version=if_version,
            tokenizer=tokenizer,
        )
        attempts = Attempts(self._retry, timeout)
        while True:
            held = upload.held_bytes(bundle, await self._find_upload(bundle.upload_id, attempts.left()))
            try:
                response = await self._upload(bundle, held, progress, attempts.left())
            except LoramuxError as error:
                # A push is idempotent: its id and its content decide the outcome.
                await sleep(attempts.pause(error, idempotent=True, moved=upload.has_moved(error)))
            else:
                resumed = sum(held.values())
                adapter = convert.adapter(response.adapter)
                sent = bundle.total - resumed
                return Pushed(adapter, response.created, sent, resumed, bundle.left_out, bundle.remark)

    async def query_upload(self, upload_id: str) -> tuple[FileProgress, ...]:
        """What the server has durably received of an upload that is not published yet; NotFound when it knows none."""
        request = adapters_pb2.QueryUploadRequest(upload_id=upload_id)
        return convert.file_progress(await self._call(self._adapters.QueryUpload, request, idempotent=True))

    async def adapters(self, *, page_size: int = 100) -> AsyncIterator[Adapter]:
        """Every adapter, page by page."""
        token = ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=page_size, page_token=token)
            page = await self._call(self._adapters.ListAdapters, request, idempotent=True)
            for message in page.adapters:
                yield convert.adapter(message)
            token = page.next_page_token
            if not token:
                return

    async def adapter(self, name: str) -> Adapter:
        """One adapter by name, alias or name@digest."""
        request = adapters_pb2.GetAdapterRequest(adapter=name)
        return convert.adapter(await self._call(self._adapters.GetAdapter, request, idempotent=True))

    async def update(
        self,
        name: str,
        *,
        pinned: bool | None = None,
        merge: bool | None = None,
        add_aliases: Sequence[str] = (),
        remove_aliases: Sequence[str] = (),
        set_labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        version: str = "",
        if_version: str = "",
    ) -> Adapter:
        """Change what is given and nothing else. `pinned` and `merge` are desired state: watch `residency`.

        `version` (the start of a digest, at least 8 digits) is one that a name of yours keeps: the name points at it
        from now on. With `if_version` all of it is refused (FailedPrecondition) unless the name points there now.
        """
        changes = AdapterChanges(
            pinned,
            merge,
            tuple(add_aliases),
            tuple(remove_aliases),
            set_labels or {},
            tuple(remove_labels),
            version,
            if_version,
        )
        request = convert.update_request(name, changes)
        # An alias that was added, or a name that was switched, may have been moved on before a repeat.
        idempotent = not (changes.add_aliases or version or if_version)
        return convert.adapter(await self._call(self._adapters.UpdateAdapter, request, idempotent=idempotent))

    async def rollback(self, name: str, to: str = "") -> Adapter:
        """Point a name at the version it had before, or at the one that `to` begins; what points there now is kept too,
        so a second rollback undoes the first. Refused where somebody else has moved it meanwhile.
        """
        now = await self.adapter(name)
        return await self.update(now.name, version=to or convert.version_before(now), if_version=now.digest)

    async def delete(self, name: str) -> None:
        """Remove a name and its aliases; running requests end on their version."""
        await self._call(self._adapters.DeleteAdapter, adapters_pb2.DeleteAdapterRequest(name=name))

    async def pull(
        self,
        name: str,
        directory: str | PathLike[str],
        *,
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Pulled:
        """Write an adapter's files, byte for byte as uploaded, into `directory`; all or none appear."""
        return await self._download(name, Download(Path(directory), overwrite=overwrite, report=progress), timeout)

    async def verify(
        self, name: str, *, progress: ProgressCallback | None = None, timeout: float | None = None
    ) -> Pulled:
        """Read an adapter back from the server and check every sha256, keeping nothing."""
        return await self._download(name, Download(None, report=progress), timeout)

    # Health

    async def is_healthy(self, *, timeout: float = 5.0) -> bool:
        """Whether the server answers SERVING; raises when it cannot be asked."""
        response = await self._once(self._health.Check, health_pb2.HealthCheckRequest(), timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_healthy(self, timeout: float = 60.0, *, poll: float = 0.2) -> None:
        """Return once the server serves; raises Unavailable with the last state after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        state = ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                if await self.is_healthy(timeout=max(0.05, min(left, 5.0))):
                    return
                state = "the server answers NOT_SERVING"
            except ClientClosed:
                raise
            except DeadlineExceeded as error:  # it may be of the time left here, and says less than an answer did
                state = state or str(error)
            except LoramuxError as error:
                state = str(error)
            await sleep(min(poll, max(0.0, deadline - time.monotonic())))
        raise Unavailable(f"not healthy after {timeout:g} s: {state or 'not asked yet'}")

    # Calls

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed()

    async def _once(self, method: Method[T], request: object, timeout: float | None) -> T:
        self._check_open()
        try:
            return await method(request, timeout=timeout)
        except CallError as error:
            raise read_error(error, self.address) from None

    async def _call(
        self,
        method: Method[T],
        request: object,
        attempts: Attempts | None = None,
        *,
        idempotent: bool = False,
    ) -> T:
        attempts = attempts or Attempts(self._retry, each=CALL_TIMEOUT)
        while True:
            try:
                return await self._once(method, request, attempts.left())
            except LoramuxError as error:
                pause = attempts.pause(error, idempotent=idempotent)
            await sleep(pause)

    async def _stream(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[StreamPart, None]:
        attempts = Attempts(self._retry, timeout)
        while True:
            started = False
            self._check_open()
            call: Any = self._inference.GenerateStream(request, timeout=attempts.left())
            try:
                async for response in call:
                    started = True
                    yield convert.stream_part(response)
                return
            except CallError as raised:
                error = read_error(raised, self.address)
            finally:
                call.cancel()  # without effect on a call that has ended
            if started:
                raise error
            await sleep(attempts.pause(error, idempotent=False))

    async def _find_upload(self, upload_id: str, timeout: float | None) -> tuple[FileProgress, ...]:
        request = adapters_pb2.QueryUploadRequest(upload_id=upload_id)
        attempts = Attempts(self._retry, timeout, each=CALL_TIMEOUT)
        try:
            found = await self._call(self._adapters.QueryUpload, request, attempts, idempotent=True)
        except NotFound:
            return ()
        return convert.file_progress(found)

    async def _upload(
        self,
        bundle: upload.Bundle,
        held: Mapping[str, int],
        progress: ProgressCallback | None,
        timeout: float | None,
    ) -> adapters_pb2.UploadAdapterResponse:
        self._check_open()
        messages = upload.messages(bundle, held, progress)
        response: adapters_pb2.UploadAdapterResponse = await send_all(
            self._adapters.UploadAdapter, messages, timeout, self.address
        )
        return response

    async def _download(self, name: str, download: Download, timeout: float | None) -> Pulled:
        request = adapters_pb2.DownloadAdapterRequest(adapter=name)
        attempts = Attempts(self._retry, timeout)
        with download:
            while True:
                started = False
                self._check_open()
                call: Any = self._adapters.DownloadAdapter(request, timeout=attempts.left())
                try:
                    async for response in call:
                        started = True
                        await run_blocking(download.feed, response)
                    return await run_blocking(download.finish)
                except CallError as raised:
                    error = read_error(raised, self.address)
                finally:
                    call.cancel()
                if started:
                    raise error
                await sleep(attempts.pause(error, idempotent=True))

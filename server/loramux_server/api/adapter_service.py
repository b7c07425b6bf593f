"""AdapterService: adapters come, are shown, change and go.

Translates between the wire and the registry; where an adapter is at this moment comes from the engine's side. Decides
nothing about files.
"""

# ruff: noqa: N802 -- methods are named by the contract

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from grpc import aio

from loramux_adapters.store.records import AdapterRecord
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc
from loramux_server.api import validate
from loramux_server.api.convert_adapters import (
    read_update,
    write_adapter,
    write_chunk,
    write_entries,
    write_progress,
)
from loramux_server.api.gate import Gate, Services
from loramux_server.api.upload import UploadStream
from loramux_server.errors import ClientStalled, InvalidRequest, status_of
from loramux_server.observe.logs import DIGITS, note

DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_PAGE_TOKEN = 512
_DOWNLOAD_CHUNK = 512 << 10

Context = aio.ServicerContext[Any, Any]


class UploadObserver(Protocol):
    """Counts uploads."""

    def upload(self, outcome: str) -> None: ...

    def received(self, count: int) -> None: ...


@dataclass(frozen=True)
class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """One per server. `tenant_of` says on whose behalf a call is made."""

    gate: Gate
    tenant_of: Callable[[Context], str]
    observer: UploadObserver
    stall_seconds: float = 30.0

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Context
    ) -> adapters_pb2.UploadAdapterResponse:
        """Take an upload to its commit, then validate and publish it."""
        services = self.gate.enter()
        tenant = self.tenant_of(context)
        stream = UploadStream(
            services.registry, tenant, stall_seconds=self.stall_seconds, received=self.observer.received
        )
        outcome = "cut"
        try:
            upload_id = await stream.run(request_iterator)
            published = await services.registry.publish(tenant, upload_id)
            note(digest=published.record.digest[:DIGITS])
            outcome = "created" if published.created else "unchanged"
        except Exception as error:
            outcome = status_of(error).reason.lower()
            if not isinstance(error, ClientStalled):
                await stream.discard(request_iterator)
            raise
        finally:
            self.observer.upload(outcome)
        return adapters_pb2.UploadAdapterResponse(adapter=_write(services, published.record), created=published.created)

    async def QueryUpload(
        self, request: adapters_pb2.QueryUploadRequest, context: Context
    ) -> adapters_pb2.QueryUploadResponse:
        """How many bytes of each file are safe."""
        validate.check(validate.upload_id("upload_id", request.upload_id))
        registry = self.gate.look().registry
        return write_progress(await registry.query_upload(self.tenant_of(context), request.upload_id))

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        """The record behind a reference."""
        note(adapter=request.adapter)
        validate.check(validate.reference("adapter", request.adapter))
        services = self.gate.look()
        return _write(services, await services.registry.get(self.tenant_of(context), request.adapter))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """A page of the tenant's adapters by name."""
        services = self.gate.look()
        size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE
        validate.check(_page(size, request.page_token))
        page = await services.registry.list(self.tenant_of(context), size, request.page_token)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[_write(services, record) for record in page.records], next_page_token=page.next_page_token
        )

    async def UpdateAdapter(self, request: adapters_pb2.UpdateAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        """Change what the store remembers, desired state included; the residency shows what comes of it."""
        note(adapter=request.name)
        services = self.gate.enter()
        validate.check(
            validate.name("name", request.name),
            validate.labels("set_labels", request.set_labels),
            validate.aliases("add_aliases", request.add_aliases),
            validate.aliases("remove_aliases", request.remove_aliases),
            validate.version("version", request.version),
            validate.version("if_version", request.if_version),
        )
        return _write(
            services, await services.registry.update(self.tenant_of(context), request.name, read_update(request))
        )

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Remove a name; requests that run on it finish on their version."""
        note(adapter=request.name)
        services = self.gate.enter()
        validate.check(validate.name("name", request.name))
        await services.registry.delete(self.tenant_of(context), request.name)
        return adapters_pb2.DeleteAdapterResponse()

    async def DownloadAdapter(
        self, request: adapters_pb2.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[adapters_pb2.DownloadAdapterResponse]:
        """The files of a version, which is held until the last byte was taken."""
        note(adapter=request.adapter)
        services = self.gate.enter()
        validate.check(validate.reference("adapter", request.adapter))
        with await services.registry.download(self.tenant_of(context), request.adapter) as download:
            note(digest=download.digest[:DIGITS])
            yield write_entries(download.digest, download.files)
            async with aclosing(download.chunks(_DOWNLOAD_CHUNK)) as chunks:
                async for chunk in chunks:
                    yield write_chunk(chunk.file, chunk.offset, chunk.data)


def _page(size: int, token: str) -> Iterator[InvalidRequest]:
    if not 1 <= size <= MAX_PAGE:
        yield InvalidRequest("page_size", f"must be 1 to {MAX_PAGE}", metadata={"max_page_size": str(MAX_PAGE)})
    if len(token) > MAX_PAGE_TOKEN:
        yield InvalidRequest("page_token", "is not one that this server gave")


def _write(services: Services, record: AdapterRecord) -> adapters_pb2.Adapter:
    return write_adapter(record, services.states.state(record.digest), services.model.fingerprint)

"""One upload call: begin, chunks, commit, and nothing after.

grpc.aio ends a cut client stream as if the client had finished, so an upload is complete
only by its explicit commit. Knows no adapter format; bytes and hashes are the store's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from loramux_protos.v1 import adapters_pb2
from loramux_server.api import validate
from loramux_server.api.convert_adapters import read_manifest
from loramux_server.errors import ClientStalled, InvalidRequest, LoramuxError
from loramux_server.observe.logs import note
from loramux_server.registry import Registry

MAX_CHUNK_BYTES = 1 << 20
_HALF_CLOSE_SECONDS = 5.0  # for the end of the stream after the commit
_DISCARD_SECONDS = 1.0
_DISCARD_BYTES = 16 << 20  # more would cost a refusal milliseconds of processor time
_MESSAGE_BYTES = 16 << 10  # what a message costs beside its bytes, in bytes


class UploadStream:
    """Feeds one call's messages into the registry; `run` returns the upload's id once its commit came."""

    def __init__(
        self, registry: Registry, tenant: str, *, stall_seconds: float, received: Callable[[int], None]
    ) -> None:
        self._registry = registry
        self._tenant = tenant
        self._stall_seconds = stall_seconds
        self._received = received
        self._upload_id: str | None = None

    async def run(self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> str:
        """Read to the end of the stream.

        Raises InvalidRequest when the order is wrong or the commit is missing, ClientStalled when
        nothing comes, and what the registry raises. Whatever was written stays for a resume.
        """
        while (message := await self._next(requests, self._stall_seconds)) is not None:
            match message.WhichOneof("step"):
                case "begin":
                    await self._begin(message.begin)
                case "chunk":
                    await self._chunk(message.chunk)
                case "commit":
                    return await self._commit(requests)
                case _:
                    raise InvalidRequest("step", "each message must be one of begin, chunk and commit")
        raise InvalidRequest("commit", "the stream ended without a commit; what arrived is kept for a resume")

    async def discard(self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> None:
        """Read on for a moment after a refusal, so that the caller receives it.

        A call that ends while its caller still writes gives grpc.aio clients INTERNAL in place of its status.
        """
        left = _DISCARD_BYTES
        with suppress(TimeoutError, LoramuxError):  # also what cannot be decoded: the first refusal counts
            async with asyncio.timeout(_DISCARD_SECONDS):
                async for message in requests:
                    left -= message.ByteSize() + _MESSAGE_BYTES
                    if left < 0:
                        return

    async def _begin(self, begin: adapters_pb2.UploadBegin) -> None:
        if self._upload_id is not None:
            raise InvalidRequest("begin", "only the first message may be begin")
        note(adapter=begin.name, upload_id=begin.upload_id)
        manifest = read_manifest(begin)
        validate.check(
            validate.upload_id("begin.upload_id", begin.upload_id),
            validate.name("begin.name", begin.name),
            validate.labels("begin.labels", begin.labels),
            validate.lifetime("begin", manifest.ttl_seconds, manifest.max_uses),
            validate.version("begin.if_version", begin.if_version),
        )
        await self._registry.begin_upload(self._tenant, begin.upload_id, manifest)
        self._upload_id = begin.upload_id

    async def _chunk(self, chunk: adapters_pb2.UploadChunk) -> None:
        upload_id = self._get_begun("chunk")
        if not 0 < len(chunk.data) <= MAX_CHUNK_BYTES:
            raise InvalidRequest(
                "chunk.data",
                f"must hold 1 to {MAX_CHUNK_BYTES} bytes, not {len(chunk.data)}",
                metadata={"max_chunk_bytes": str(MAX_CHUNK_BYTES)},
            )
        await self._registry.write_chunk(self._tenant, upload_id, chunk.file, chunk.offset, chunk.data)
        self._received(len(chunk.data))

    async def _commit(self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> str:
        """The stream must end here; one that stays open and silent counts as ended."""
        upload_id = self._get_begun("commit")
        try:
            after = await self._next(requests, min(_HALF_CLOSE_SECONDS, self._stall_seconds))
        except ClientStalled:
            after = None
        if after is not None:
            raise InvalidRequest("commit", "nothing may follow the commit")
        return upload_id

    def _get_begun(self, step: str) -> str:
        if self._upload_id is None:
            raise InvalidRequest(step, "the first message must be begin")
        return self._upload_id

    @staticmethod
    async def _next(
        requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], seconds: float
    ) -> adapters_pb2.UploadAdapterRequest | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise ClientStalled(seconds) from None

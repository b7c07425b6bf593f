"""Adapters as the services see them: references resolved and held, uploads validated and published.

Torch-free; what reads an adapter's files is injected. `resolve` is fast enough for the event loop;
everything that waits for a disk is `async` and runs in a thread. Knows no protobuf and no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

from loramux_adapters.adapter_files import TEXT_FILES
from loramux_adapters.combination import Term, combine_specs
from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterInvalid
from loramux_adapters.store.protocol import AdapterStore
from loramux_adapters.store.records import (
    AdapterNames,
    AdapterPage,
    AdapterRecord,
    AdapterUpdate,
    FileEntry,
    Published,
    UploadManifest,
    UploadProgress,
)
from loramux_server.combinations import Combinations
from loramux_server.held import Held, HeldCombination, Resolved, name_of
from loramux_server.publishing import AdapterCaches, CheckTexts, Publisher, ReadAdapter, ReplayCertificate, unreadable
from loramux_server.registry_expiry import ExpiryThread

_MIN_PREFIX = 8  # hex digits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownloadChunk:
    """A run of bytes of `file` at `offset`."""

    file: str
    offset: int
    data: bytes


class Download:
    """A held version's files, for streaming. A context manager."""

    def __init__(self, resolved: Resolved, files: tuple[FileEntry, ...], store: AdapterStore) -> None:
        self.digest = resolved.digest
        self.files = files
        self._resolved = resolved
        self._store = store

    async def chunks(self, size: int = 1 << 18) -> AsyncGenerator[DownloadChunk, None]:
        """Every byte of every file, in the order of `files`, at most `size` bytes at a time.

        Raises AdapterCorrupt when a file is gone, shorter than it was or of another hash; it is quarantined then.
        """
        for entry in self.files:
            stream = await asyncio.to_thread(self._store.open_file, entry)
            sha256 = hashlib.sha256()
            try:
                offset = 0
                while offset < entry.size:
                    data = await asyncio.to_thread(_read_hashed, stream, min(size, entry.size - offset), sha256)
                    if not data:
                        break
                    yield DownloadChunk(entry.file, offset, data)
                    offset += len(data)
            except OSError as error:
                raise unreadable() from error
            finally:
                stream.close()
            if sha256.hexdigest() != entry.sha256:
                await asyncio.to_thread(self._store.check_file, entry)
                raise _damaged(entry)  # healed meanwhile by a new upload: what was sent is wrong all the same

    def close(self) -> None:
        """Release the bytes. Idempotent."""
        self._resolved.release()

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Registry:
    """The only way to the adapters. Errors are those of `loramux_adapters.errors`, as AdapterStore documents them."""

    def __init__(
        self,
        store: AdapterStore,
        read: ReadAdapter,
        base: str,
        caches: AdapterCaches,
        clock: Callable[[], float] = time.time,
        combinations: Combinations | None = None,
        check_texts: CheckTexts | None = None,
        replay: ReplayCertificate | None = None,
    ) -> None:
        """`base` is the fingerprint of the base that `read` validates against; `clock` is the store's. In
        `combinations` a loader finds what the digests of combined adapters stand for."""
        self._store = store
        self._caches = caches
        self._combinations = combinations or Combinations()
        self._reconciling = threading.Lock()
        # One: memory is bounded by one adapter being read, and a collection never races a publish for the disk.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loramux-registry")
        self._publisher = Publisher(
            store,
            read,
            base,
            caches,
            self._worker,
            check_texts=check_texts,
            replay=replay,
            published=self._follow_publish,
        )
        self._reconcile()
        self._expiry = ExpiryThread(store.next_expiry, self._expire, clock)

    def close(self) -> None:
        """Finish the publish under way, then close the store. Idempotent."""
        self._expiry.close()
        self._publisher.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._store.close()

    def resolve(self, tenant: str, reference: str, *, counts: bool = True) -> Resolved:
        """Hold what `name`, `alias` or `name@<first 8 or more hex digits of the digest>` means now, for a request.

        Point reads of a local database, tens of microseconds, and a millisecond to find the nearest name of one that is
        absent. A delete or replace from here on leaves the bytes in place until the release. Where the uses of the name
        are limited, one is taken, for `Resolved.confirm`, unless `counts` is off. Raises AdapterNotFound (an unfinished
        upload is not found either, nor is what has ended by itself), AdapterInvalid (malformed or ambiguous),
        AdapterCorrupt (quarantined), StoreUnavailable.
        """
        return self._hold(tenant, reference, counts=counts)

    def resolve_all(self, tenant: str, references: Sequence[tuple[str, float]]) -> Held:
        """Hold several adapters with weights, as one: `resolve` of each. One alone, with the weight 1, is itself.

        Raises also AdapterIncompatible where they cannot act together.
        """
        with ExitStack() as held:
            parts = [(held.enter_context(self.resolve(tenant, name)), weight) for name, weight in references]
            if len(parts) == 1 and parts[0][1] == 1.0:
                held.pop_all()
                return parts[0][0]
            combination, spec = combine_specs([Term(part.spec, weight, part.name) for part, weight in parts])
            name = name_of([(part.name, weight) for part, weight in parts])
            self._combinations.hold(combination, name, spec)
            held.pop_all()
            return HeldCombination(combination, name, spec, [part for part, _ in parts], self._end_combination)

    async def begin_upload(self, tenant: str, upload_id: str, manifest: UploadManifest) -> UploadProgress:
        """Open an upload or resume it; see AdapterStore.begin_upload."""
        return await asyncio.to_thread(self._begin_upload, tenant, upload_id, manifest)

    async def write_chunk(self, tenant: str, upload_id: str, file: str, offset: int, data: bytes) -> int:
        """Append a chunk; returns the bytes received so far. See AdapterStore.write_chunk."""
        return await asyncio.to_thread(self._store.write_chunk, tenant, upload_id, file, offset, data)

    async def query_upload(self, tenant: str, upload_id: str) -> UploadProgress:
        """How far an upload has come, durably."""
        return await asyncio.to_thread(self._store.query_upload, tenant, upload_id)

    async def publish(self, tenant: str, upload_id: str) -> Published:
        """Compare hashes, validate, replay the certificate if there is one, and make the upload visible in one step.

        An upload whose files or certificate are invalid is discarded: no resume can mend it. After any other error
        it stays, so that a resume needs no byte again: with consent to another base, with room made, with
        one wrong file sent anew. Once begun it runs to its end even if the caller is cancelled.
        """
        return await asyncio.shield(self._publisher.publish(tenant, upload_id))

    def names(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        """What points at each of `digests` now. Reads the catalog; from any thread but the event loop's."""
        return {**self._store.names(digests), **self._combinations.names(digests)}

    def usage(self) -> tuple[int, int]:
        """Names in the store and bytes that they keep. As `names`."""
        return self._store.usage()

    def existing(self, digests: Collection[str]) -> frozenset[str]:
        """Those of `digests` of which there is a version, held or named. As `names`."""
        return self._store.existing(digests) | self._combinations.names(digests).keys()

    async def get(self, tenant: str, reference: str) -> AdapterRecord:
        """The record behind a reference."""
        return await asyncio.to_thread(self._store.get, tenant, *split_reference(reference))

    async def list(self, tenant: str, page_size: int = 100, page_token: str = "") -> AdapterPage:
        """A page of records by name."""
        return await asyncio.to_thread(self._store.list, tenant, page_size, page_token)

    async def update(self, tenant: str, name: str, change: AdapterUpdate) -> AdapterRecord:
        """Change aliases, labels and desired state; what is set again is tried again."""
        return await asyncio.to_thread(self._update, tenant, name, change)

    async def delete(self, tenant: str, name: str) -> None:
        """Remove a name; running requests keep its bytes."""
        await asyncio.to_thread(self._delete, tenant, name)

    async def download(self, tenant: str, reference: str) -> Download:
        """The files behind a reference as first uploaded, held until `Download.close`."""
        resolved = self._hold(tenant, reference, counts=False)
        try:
            files = await asyncio.to_thread(self._store.entries, tenant, resolved.digest)
        except BaseException:
            resolved.release()
            raise
        return Download(resolved, files, self._store)

    async def text_files(self, resolved: Resolved) -> Mapping[str, bytes]:
        """The tokenizer and chat template that a held version brings along. Raises AdapterCorrupt."""
        entries = await asyncio.to_thread(self._store.entries, resolved.tenant, resolved.digest)
        wanted = tuple(entry for entry in entries if entry.file in TEXT_FILES)
        files = {entry.file: bytearray() for entry in wanted}
        async for chunk in Download(resolved, wanted, self._store).chunks():
            files[chunk.file] += chunk.data
        return {name: bytes(data) for name, data in files.items()}

    def _hold(self, tenant: str, reference: str, *, counts: bool) -> Resolved:
        version = self._store.acquire(tenant, *split_reference(reference), counts=counts)
        return Resolved(tenant, version, self._count_use, self._release)

    async def _count_use(self, use: int) -> None:
        # A caller that goes away now leaves the use neither taken nor given back otherwise.
        await asyncio.shield(asyncio.to_thread(self._count, use))

    def _count(self, use: int) -> None:
        if self._store.count_use(use):
            self._reconcile()

    def _begin_upload(self, tenant: str, upload_id: str, manifest: UploadManifest) -> UploadProgress:
        self._expire()  # what has ended and takes the place or the name still
        return self._store.begin_upload(tenant, upload_id, manifest)

    def _follow_publish(self, published: Published) -> None:
        # Whatever was wrong with this content, bytes or base, is right now.
        self._reconcile(retry=published.record.digest)
        self._evict_removed()
        self._expiry.look()

    def _update(self, tenant: str, name: str, change: AdapterUpdate) -> AdapterRecord:
        self._expire()
        record = self._store.update(tenant, name, change)
        self._reconcile(retry=record.digest if change.pinned or change.merge else None)
        return record

    def _delete(self, tenant: str, name: str) -> None:
        self._store.delete(tenant, name)
        self._reconcile()
        self._evict_removed()

    def _reconcile(self, retry: str | None = None) -> None:
        """After every change of a name, and at the start: the whole desired state as it is now, not what has changed.

        So nothing need remember what a name pointed at, and the next call makes up for one that failed.
        The change itself is durable, whatever happens here.
        """
        with self._reconciling:  # read and passed on as one step: of two changes at once, the second passes on both
            try:
                self._caches.reconcile(self._store.desired_state(), retry)
            except AdapterError as error:
                _log.warning(
                    "the desired state could not be read, the next change of an adapter reads it again: %s", error
                )

    def _evict_removed(self) -> None:
        for removed in self._store.take_removed():
            for digest in (removed, *self._combinations.forget(removed)):
                self._caches.evict(digest)

    def _end_combination(self, digest: str) -> None:
        for forgotten in self._combinations.release(digest):
            self._caches.evict(forgotten)

    def _release(self, digest: str, use: int | None) -> None:
        if use is not None:
            self._store.give_back_use(use)
        if self._store.release(digest):
            try:
                self._worker.submit(self._collect)
            except RuntimeError:
                _log.debug("unused adapters stay until the next start: the registry is closed")

    def _expire(self) -> None:
        """Not on the worker, which would have to end a publish first."""
        if self._store.expire():
            self._reconcile()
            self._evict_removed()

    def _collect(self) -> None:
        try:
            self._store.collect()
        except AdapterError as error:
            _log.warning("collecting unused adapters failed, the next change tries again: %s", error)
        self._evict_removed()


def split_reference(reference: str) -> tuple[str, str]:
    """`name` -> (name, ""), `name@<hex>` -> (name, hex). AdapterInvalid on a short or empty version."""
    name, at, prefix = reference.partition("@")
    if at and len(prefix) < _MIN_PREFIX:
        raise AdapterInvalid(
            "the version after @ is too short",
            subject="version",
            remedy=f"give the first {_MIN_PREFIX} or more hex digits of the digest",
        )
    return name, prefix


def _read_hashed(stream: BinaryIO, size: int, sha256: hashlib._Hash) -> bytes:
    data = stream.read(size)
    sha256.update(data)
    return data


def _damaged(entry: FileEntry) -> AdapterCorrupt:
    return AdapterCorrupt(f"stored bytes of {entry.file} were damaged", subject=entry.file, remedy="try again")

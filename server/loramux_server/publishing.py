"""How an upload becomes visible: its texts and files judged, its certificate replayed, then one step in the store.

Torch-free; what reads an adapter's files and what computes are injected. Knows no protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from loramux_adapters.adapter_files import CERTIFICATE_FILE, TEXT_FILES
from loramux_adapters.certificate.replay import Replay, check_replay
from loramux_adapters.errors import AdapterInvalid, CertificateRefused, StoreUnavailable
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store.protocol import AdapterStore
from loramux_adapters.store.records import DesiredState, Published, ReplayRecord


class ReadAdapter(Protocol):
    """Read an adapter's files and judge them against the base; raises AdapterInvalid or AdapterIncompatible."""

    def __call__(self, files: Mapping[str, Path], *, allow_base_mismatch: bool) -> Weights: ...


class CheckTexts(Protocol):
    """Judge the tokenizer and template among an adapter's files; raises AdapterInvalid or AdapterIncompatible."""

    def __call__(self, files: Mapping[str, Path]) -> object: ...


class ReplayCertificate(Protocol):
    """What the certificate of an adapter, which requests can load by its digest, comes to; see `Certifier.replay`."""

    async def __call__(self, tenant: str, spec: AdapterSpec, content: bytes) -> Replay: ...


class AdapterCaches(Protocol):
    """What is kept of adapters beside the store: in host memory, on the device, merged. Safe from any thread."""

    def offer(self, weights: Weights) -> None:
        """They were read to be published, and are likely to be asked for at once: they need not be read again."""

    def lend(self, weights: Weights) -> AbstractContextManager[None]:
        """While it lasts they can be loaded by their digest although the store does not have them yet."""

    def evict(self, digest: str) -> None:
        """Free all of it: no name, kept version or request reaches this digest any more."""

    def reconcile(self, desired: DesiredState, retry: str | None = None) -> None:
        """The desired state from now on: bring it about in the background, and drop what is not in it.

        What was refused or failed before is left alone, unless it is `retry`. Never waits.
        """


class Publisher:
    """One per registry. Publishes go one after another: one adapter that is being published is in memory."""

    def __init__(
        self,
        store: AdapterStore,
        read: ReadAdapter,
        base: str,
        caches: AdapterCaches,
        worker: ThreadPoolExecutor,
        *,
        check_texts: CheckTexts | None,
        replay: ReplayCertificate | None,
        published: Callable[[Published], None],
    ) -> None:
        """`worker` runs what waits for the disk; `published` is called there after each publish."""
        self._store, self._read, self._base, self._caches, self._worker = store, read, base, caches, worker
        self._check_texts, self._replay, self._published = check_texts, replay, published
        self._publishing = asyncio.Lock()
        # Of their own: a tokenizer takes seconds where it is made to, and processes of its own.
        self._text_workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="loramux-texts")

    def close(self) -> None:
        """Ends after the texts that are being judged."""
        self._text_workers.shutdown(wait=True, cancel_futures=True)

    async def publish(self, tenant: str, upload_id: str) -> Published:
        """See `Registry.publish`."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._text_workers, self._judge_texts, tenant, upload_id)
        async with self._publishing:
            weights, certificate = await loop.run_in_executor(self._worker, self._judge, tenant, upload_id)
            if certificate is None:
                return await loop.run_in_executor(self._worker, self._publish, tenant, upload_id, weights, None)
            try:
                replay = await self._try_out(tenant, upload_id, weights, certificate)
                return await loop.run_in_executor(self._worker, self._publish, tenant, upload_id, weights, replay)
            except BaseException:
                await loop.run_in_executor(self._worker, self._forget_unpublished, weights.spec.digest)
                raise

    async def _try_out(self, tenant: str, upload_id: str, weights: Weights, certificate: bytes) -> ReplayRecord:
        """Raises CertificateRefused, and what a request is refused with."""
        try:
            if self._replay is None:
                raise CertificateRefused("this server replays no certificates", subject=CERTIFICATE_FILE)
            with self._caches.lend(weights):
                replay = await self._replay(tenant, weights.spec, certificate)
            check_replay(replay)
        except (CertificateRefused, AdapterInvalid):
            await asyncio.to_thread(self._store.discard_upload, tenant, upload_id)
            raise
        return ReplayRecord(replay.difference, replay.divergence, replay.tolerance, replay.dtype)

    def _forget_unpublished(self, digest: str) -> None:
        """What the replay left in memory and on the device."""
        if not self._store.existing([digest]):
            self._caches.evict(digest)

    def _judge_texts(self, tenant: str, upload_id: str) -> None:
        """Files that are put in their place afterwards are judged before they are used."""
        files = self._store.staged_files(tenant, upload_id).files
        if self._check_texts is None or not any(name in TEXT_FILES for name in files):
            return
        try:
            self._check_texts(files)
        except AdapterInvalid:
            self._store.discard_upload(tenant, upload_id)
            raise
        except OSError as error:
            raise unreadable() from error

    def _judge(self, tenant: str, upload_id: str) -> tuple[Weights, bytes | None]:
        """What was read, and its certificate."""
        staged = self._store.staged_files(tenant, upload_id)
        try:
            weights = self._read(staged.files, allow_base_mismatch=staged.manifest.allow_base_mismatch)
            certificate = staged.files.get(CERTIFICATE_FILE)
            return weights, None if certificate is None else certificate.read_bytes()
        except AdapterInvalid:
            self._store.discard_upload(tenant, upload_id)
            raise
        except OSError as error:
            raise unreadable() from error

    def _publish(self, tenant: str, upload_id: str, weights: Weights, replay: ReplayRecord | None) -> Published:
        published = self._store.publish(tenant, upload_id, weights.spec, self._base, replay)
        self._caches.offer(weights)
        if not self._store.existing([weights.spec.digest]):  # deleted meanwhile, and evicted before it was offered
            self._caches.evict(weights.spec.digest)
        self._published(published)
        return published


def unreadable() -> StoreUnavailable:
    """Of an OSError while files of the store are read."""
    return StoreUnavailable("the store cannot be read", subject="store", remedy="try again")

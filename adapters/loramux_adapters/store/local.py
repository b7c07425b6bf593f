"""The embedded store: one directory with a catalog, blobs, open uploads and a lock.

What lies in it is listed in docs/store.md.
Bytes are durable before the catalog's transaction that names them ends; they go after the one that
forgets them. Knows no tensor, no network, no running request beyond its hold.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.errors import AdapterConflict, AdapterCorrupt, AdapterError, AdapterNotFound, StoreUnavailable
from loramux_adapters.spec import AdapterId, AdapterSpec
from loramux_adapters.store import changes, checks, lifetimes, schema
from loramux_adapters.store.blobs import Blobs
from loramux_adapters.store.catalog import Catalog, Connect
from loramux_adapters.store.collector import Collector
from loramux_adapters.store.disk import Disk, storage_errors
from loramux_adapters.store.ends import Ends
from loramux_adapters.store.holds import Holds
from loramux_adapters.store.journal import Journal, Publication
from loramux_adapters.store.lock import DirectoryLock
from loramux_adapters.store.lost import Lost
from loramux_adapters.store.records import (
    AdapterNames,
    AdapterPage,
    AdapterRecord,
    AdapterUpdate,
    AdapterVersion,
    DesiredState,
    FileEntry,
    Health,
    Published,
    Quotas,
    ReplayRecord,
    StagedFiles,
    UploadManifest,
    UploadProgress,
)
from loramux_adapters.store.reserve import Reserve
from loramux_adapters.store.uploads import Uploads

_log = logging.getLogger(__name__)


class LocalStore:
    """AdapterStore on a local file system; see that protocol for what each method promises.

    Opening takes the directory's lock (or `lock`, held already and the store's to release from now on), checks the
    catalog and sweeps what a killed process left: files that the catalog does not know move to `lost/`, open uploads
    younger than `Quotas.upload_ttl_seconds` are kept for a resume.
    Raises StoreUnavailable (in use, read-only, full) and StoreCorrupt with the repair command.
    `disk`, `connect` and `clock` (seconds since the epoch) are what a test replaces.
    """

    def __init__(
        self,
        root: Path,
        quotas: Quotas | None = None,
        *,
        lock: DirectoryLock | None = None,
        disk: Disk | None = None,
        connect: Connect = schema.connect,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._quotas = quotas or Quotas()
        self._clock = clock
        self._holds = Holds()
        # Publish, delete and collect exclude each other; readers and holds do not wait for this one.
        self._changing = threading.RLock()
        self._unknown: set[str] = set()  # blobs that the catalog did not know at the start
        disk = disk or Disk()
        self._reserve = Reserve(root, disk)
        self._journal = Journal(root, disk)
        self._lost = Lost(root, disk, clock)
        with storage_errors("be opened"):
            disk.make_directory(root)
            self._lock = lock or DirectoryLock(root)
        try:
            with storage_errors("be opened"):
                self._blobs = Blobs(root / "blobs", disk)
                self._uploads = Uploads(root / "uploads", disk, self._quotas, clock)
                blobs_exist = not self._blobs.is_empty()
                self._catalog = self._reserve.spend_on(
                    lambda: Catalog(root, blobs_exist=blobs_exist, connect=connect, clock=clock)
                )
        except BaseException:
            self._lock.release()
            raise
        self._collector = Collector(self._catalog, self._blobs, self._holds, self._reserve, self._changing)
        self._ends = Ends(self._catalog, self._collector, self._holds, self._reserve, self._changing, clock)
        try:
            self._sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._catalog.close()
        finally:
            self._lock.release()

    # Uploads

    def begin_upload(self, tenant: str, upload_id: str, manifest: UploadManifest) -> UploadProgress:
        checks.check_name(tenant, "tenant")
        checks.check_upload_id(upload_id)
        checks.check_manifest(manifest, self._quotas)
        self.expire()
        # A courtesy before the bytes are sent; what counts is the same check in the publish transaction.
        if self._catalog.has_alias(tenant, manifest.name):
            raise AdapterConflict(f"{manifest.name!r} is an alias", subject=manifest.name)
        if not self._catalog.has_name(tenant, manifest.name):
            changes.check_count(self._catalog.count(tenant), self._quotas)
        elif manifest.ends and not self._catalog.has_end(tenant, manifest.name):
            raise lifetimes.without_end(manifest.name)
        return self._uploads.begin(tenant, upload_id, manifest)

    def write_chunk(self, tenant: str, upload_id: str, file: str, offset: int, data: bytes) -> int:
        checks.check_upload(tenant, upload_id)
        with self._uploads.open(tenant, upload_id) as upload:
            return upload.write(file, offset, data)

    def query_upload(self, tenant: str, upload_id: str) -> UploadProgress:
        checks.check_upload(tenant, upload_id)
        with self._uploads.open(tenant, upload_id) as upload:
            upload.sync()
            return upload.progress(upload_id)

    def staged_files(self, tenant: str, upload_id: str) -> StagedFiles:
        checks.check_upload(tenant, upload_id)
        with self._uploads.open(tenant, upload_id) as upload:
            return upload.staged()

    def discard_upload(self, tenant: str, upload_id: str) -> None:
        checks.check_upload(tenant, upload_id)
        try:
            with self._uploads.open(tenant, upload_id) as upload:
                self._uploads.end(tenant, upload_id, upload)
        except AdapterNotFound:
            return

    def publish(
        self, tenant: str, upload_id: str, spec: AdapterSpec, base: str, replay: ReplayRecord | None = None
    ) -> Published:
        checks.check_upload(tenant, upload_id)
        checks.check_digest(spec.digest)
        checks.check_fingerprint(base)
        with self._uploads.open(tenant, upload_id) as upload:
            if not upload.verified:
                # Ended and begun anew since the caller read it: `spec` may be of other bytes.
                raise AdapterConflict(f"upload {upload_id!r} is not staged", subject=upload_id, remedy="commit again")
            staged = upload.staged()
            upload.sync()
            with self._changing:
                now = self._clock()
                created = self._publish(tenant, staged, spec, base, replay, now)
                record = self._catalog.get(tenant, staged.manifest.name, published=now)
            self._uploads.end(tenant, upload_id, upload)
        self._collector.collect_quietly()
        return Published(record, created)

    def _publish(
        self, tenant: str, staged: StagedFiles, spec: AdapterSpec, base: str, replay: ReplayRecord | None, now: float
    ) -> bool:
        manifest = staged.manifest
        new: set[str] = set()
        try:
            with self._catalog.transaction() as tx:
                changed, install = changes.publish(tx, tenant, manifest, spec, base, self._quotas, now, replay)
                if install:
                    with storage_errors("keep an adapter"):
                        for entry in install:
                            if not self._blobs.exists(entry.sha256):
                                new.add(entry.sha256)
                            self._blobs.install(staged.files[entry.file], entry.sha256)
                if (changed or install) and not manifest.ends:  # restored it would have no end
                    is_whole = len(install) == len(manifest.files)
                    files = manifest.files if is_whole else (*self._catalog.entries(tenant, spec.digest), *install)
                    hashes = {entry.file: entry.sha256 for entry in files}
                    with storage_errors("keep an adapter"):
                        self._journal.append(Publication(tenant, manifest.name, spec.digest, hashes))
        except BaseException:
            self._collector.doubt(new)
            raise
        self._collector.settle()
        self._shorten_journal(only_if_large=True)
        return changed

    # Names

    def get(self, tenant: str, name: str, prefix: str = "") -> AdapterRecord:
        checks.check_reference(tenant, name, prefix)
        return self._catalog.get(tenant, name, prefix)

    def list(self, tenant: str, page_size: int = 100, page_token: str = "") -> AdapterPage:
        checks.check_name(tenant, "tenant")
        checks.check_page_size(page_size)
        records = self._catalog.page(tenant, checks.decode_page_token(page_token), page_size + 1)
        if len(records) <= page_size:
            return AdapterPage(records, "")
        return AdapterPage(records[:page_size], checks.encode_page_token(records[page_size - 1].id.name))

    def update(self, tenant: str, name: str, change: AdapterUpdate) -> AdapterRecord:
        checks.check_reference(tenant, name, "")
        for alias in (*change.add_aliases, *change.remove_aliases):
            checks.check_name(alias, "alias")
        for prefix in filter(None, (change.version, change.if_version)):
            checks.check_prefix(prefix)
        checks.check_labels(change.set_labels)
        self.expire()
        with self._changing:
            with self._catalog.transaction() as tx:
                changes.switch(tx, tenant, name, change, self._quotas, self._clock())
                changes.update(tx, tenant, name, change, self._clock())
            self._collector.settle()
            record = self._catalog.get(tenant, name)
        self._collector.collect_quietly()
        return record

    def delete(self, tenant: str, name: str) -> None:
        checks.check_reference(tenant, name, "")
        with self._changing:
            self._reserve.spend_on(lambda: self._delete(tenant, name))
            self._collector.settle()
        self._collector.collect_quietly()

    def _delete(self, tenant: str, name: str) -> None:
        with self._catalog.transaction() as tx:
            changes.delete(tx, tenant, name)

    def desired_state(self) -> DesiredState:
        return self._catalog.desired_state()

    def names(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        return self._catalog.names(digests)

    def usage(self) -> tuple[int, int]:
        return self._catalog.usage()

    def existing(self, digests: Collection[str]) -> frozenset[str]:
        return self._catalog.existing(digests)

    # Holds

    def acquire(self, tenant: str, name: str, prefix: str = "", *, counts: bool = False) -> AdapterVersion:
        checks.check_reference(tenant, name, prefix)
        with self._holds.lock:
            found = self._catalog.find(tenant, name, prefix)
            digest = found.spec.digest
            if found.health is Health.CORRUPT:
                raise _corrupt(digest)
            use = self._ends.take_use(found) if counts else None
            self._holds.add(digest)
        return AdapterVersion(AdapterId(tenant, found.name), digest, found.spec, use)

    def count_use(self, use: int) -> bool:
        return self._ends.count_use(use)

    def give_back_use(self, use: int) -> None:
        self._ends.give_back_use(use)

    def next_expiry(self) -> float | None:
        return self._catalog.next_expiry()

    def expire(self) -> int:
        return self._ends.expire()

    def hold(self, digest: str) -> None:
        checks.check_digest(digest)
        with self._holds.lock:
            if digest not in self._holds and not self._catalog.is_reachable(digest):
                raise AdapterNotFound(f"no adapter version {digest}", subject=digest)
            self._holds.add(digest)

    def release(self, digest: str) -> bool:
        with self._holds.lock:
            return self._holds.drop(digest)

    def collect(self) -> int:
        return self._collector.collect()

    def take_removed(self) -> frozenset[str]:
        return self._collector.take_removed()

    # Bytes

    def files(self, digest: str) -> Mapping[str, Path]:
        self.hold(digest)
        try:
            for health, files in self._catalog.copies(digest):
                if health is Health.OK and all(self._is_intact(sha256) for sha256 in files.values()):
                    return {file: self._blobs.path(sha256) for file, sha256 in files.items()}
            raise _corrupt(digest)
        finally:
            if self.release(digest):
                self._collector.collect_quietly()

    def accepted_bases(self, digest: str) -> frozenset[str]:
        checks.check_digest(digest)
        return self._catalog.bases(digest)

    def consents_to_base(self, digest: str) -> bool:
        return any(spec.base_mismatch for spec in self._catalog.specs(digest))

    def entries(self, tenant: str, digest: str) -> tuple[FileEntry, ...]:
        checks.check_name(tenant, "tenant")
        checks.check_digest(digest)
        entries = self._catalog.entries(tenant, digest)
        if not entries:
            raise AdapterNotFound(f"no adapter version {digest}", subject=digest)
        return entries

    def certificate(self, digest: str) -> bytes | None:
        checks.check_digest(digest)
        entry = self._catalog.find_file(digest, CERTIFICATE_FILE)
        if entry is None:
            return None
        self.check_file(entry)
        with self.open_file(entry) as file:
            return file.read()

    def open_file(self, entry: FileEntry) -> BinaryIO:
        checks.check_digest(entry.sha256)
        with storage_errors("read an adapter"):
            try:
                return self._blobs.open(entry.sha256)
            except FileNotFoundError as error:
                self._is_intact(entry.sha256)
                raise _corrupt(entry.sha256) from error

    def check_file(self, entry: FileEntry) -> None:
        checks.check_digest(entry.sha256)
        if not self._is_intact(entry.sha256):
            raise _corrupt(entry.sha256)

    def _is_intact(self, sha256: str) -> bool:
        """Re-hash a blob and quarantine it if it is damaged."""
        with storage_errors("read an adapter"):
            if self._blobs.is_intact(sha256):
                return True
            with self._changing:
                # Once more where no publish can be replacing it: a healed blob must not be marked.
                if self._blobs.is_intact(sha256):
                    return True
                _log.error("stored file %s does not match its hash: quarantined", sha256)
                try:
                    with self._catalog.transaction() as tx:
                        changes.quarantine(tx, sha256)
                except StoreUnavailable as error:
                    _log.warning("the quarantine could not be recorded, the next load hashes again: %s", error)
                return False

    # Cleaning

    def _sweep(self) -> None:
        self._uploads.sweep()
        self.expire()
        self.collect()
        with storage_errors("sweep"):
            unknown = self._blobs.sweep(self._catalog.blobs())
        self._unknown = {blob.name for blob in unknown}  # should they stay where they are
        self._lost.take(unknown)
        self._shorten_journal()

    def _shorten_journal(self, *, only_if_large: bool = False) -> None:
        """After a change that is already durable: failing now only means a longer journal."""
        try:
            if self._journal.is_large or not only_if_large:
                self._journal.shorten(self._catalog.publications(), self._lost.files().keys() | self._unknown)
        except (OSError, AdapterError) as error:
            _log.warning("the journal of publishes could not be shortened: %s", error)


def _corrupt(digest: str) -> AdapterCorrupt:
    return AdapterCorrupt(
        f"stored bytes of {digest[:12]} are damaged", subject=digest, remedy="upload the same content again"
    )

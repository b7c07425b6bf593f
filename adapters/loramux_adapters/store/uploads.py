"""All open uploads: `<root>/<tenant>/<upload_id>/`, found again after a restart.

Knows no catalog. A lock per upload, so that one that is hashed or synced delays no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import AdapterConflict, AdapterNotFound, QuotaExceeded
from loramux_adapters.store.disk import Disk, storage_errors
from loramux_adapters.store.records import Quotas, UploadManifest, UploadProgress
from loramux_adapters.store.staged_upload import StagedUpload

_MOST_ENDED = 8  # times that an upload ends under a caller who begins it

_log = logging.getLogger(__name__)


class Uploads:
    """Tenants and upload ids must have been checked: they become directory names."""

    def __init__(self, root: Path, disk: Disk, quotas: Quotas, clock: Callable[[], float]) -> None:
        self._root = root
        self._disk = disk
        self._quotas = quotas
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], StagedUpload] = {}
        disk.make_directory(root)

    def begin(self, tenant: str, upload_id: str, manifest: UploadManifest) -> UploadProgress:
        """Open or resume; see AdapterStore.begin_upload."""
        for _ in range(_MOST_ENDED):
            upload = self._find_or_create(tenant, upload_id, manifest)
            with upload.lock:
                if upload.closed:  # by another caller with the same id, who has published it: this one begins anew
                    self._forget(tenant, upload_id, upload)
                    continue
                if not upload.resume(manifest):
                    raise AdapterConflict(
                        f"upload {upload_id!r} is open for another manifest",
                        subject=upload_id,
                        remedy="resume it with its own name and files, or choose another upload_id",
                    )
                return upload.progress(upload_id)
        raise AdapterConflict(
            f"upload {upload_id!r} is ended by others again and again", subject=upload_id, remedy="try again"
        )

    @contextmanager
    def open(self, tenant: str, upload_id: str) -> Iterator[StagedUpload]:
        """An open upload, to this thread alone. AdapterNotFound."""
        with self._lock, storage_errors("read an upload"):
            upload = self._find(tenant, upload_id)
        if upload is not None:
            with upload.lock:
                if not upload.closed:
                    yield upload
                    return
        raise AdapterNotFound(f"no upload {upload_id!r}", subject=upload_id, remedy="begin it")

    def end(self, tenant: str, upload_id: str, upload: StagedUpload) -> None:
        """Remove an upload that this thread holds."""
        upload.remove()
        self._forget(tenant, upload_id, upload)

    def _find_or_create(self, tenant: str, upload_id: str, manifest: UploadManifest) -> StagedUpload:
        with self._lock, storage_errors("open an upload"):
            upload = self._find(tenant, upload_id)
            if upload is None:
                self._check_open(tenant)
                upload = StagedUpload.create(self._root / tenant / upload_id, manifest, self._disk)
                self._open[tenant, upload_id] = upload
            return upload

    def _forget(self, tenant: str, upload_id: str, upload: StagedUpload) -> None:
        with self._lock:
            if self._open.get((tenant, upload_id)) is upload:
                del self._open[tenant, upload_id]

    def sweep(self) -> int:
        """Remove what no upload can use: idle ones past their time and torn ones; returns how many."""
        with self._lock, storage_errors("sweep uploads"):
            return sum(self._sweep(tenant) for tenant in self._disk.children(self._root))

    def _find(self, tenant: str, upload_id: str) -> StagedUpload | None:
        """Under the table's lock. May be closed: then its directory is just being removed."""
        upload = self._open.get((tenant, upload_id))
        if upload is not None:
            return upload
        upload = StagedUpload.restore(self._root / tenant / upload_id, self._disk)
        if upload is not None:
            self._open[tenant, upload_id] = upload
        return upload

    def _check_open(self, tenant: str) -> None:
        directory = self._root / tenant
        if len(self._disk.children(directory)) >= self._quotas.max_open_uploads:
            self._sweep(directory)
        if len(self._disk.children(directory)) >= self._quotas.max_open_uploads:
            raise QuotaExceeded(
                f"all {self._quotas.max_open_uploads} uploads allowed are open",
                subject="uploads",
                remedy="commit one, or wait until an idle one runs out",
            )

    def _sweep(self, tenant: Path) -> int:
        """Under the table's lock. One that a thread is using is not idle, however old its files."""
        removed = 0
        for directory in self._disk.children(tenant):
            upload = self._open.get((tenant.name, directory.name))
            if upload is not None and not upload.lock.acquire(blocking=False):
                continue
            try:
                if self._is_dead(directory):
                    self._disk.remove_tree(directory)
                    removed += 1
                    if upload is not None:
                        upload.closed = True
                        del self._open[tenant.name, directory.name]
            finally:
                if upload is not None:
                    upload.lock.release()
        return removed

    def _is_dead(self, directory: Path) -> bool:
        if not directory.is_dir() or StagedUpload.restore(directory, self._disk) is None:
            return True
        touched = max(self._disk.modified(path) for path in (directory, *self._disk.children(directory)))
        return self._clock() - touched > self._quotas.upload_ttl_seconds

"""One open upload on disk: a directory with `upload.json` and a partial file per manifest entry.

Knows no quota and no catalog. Used under its own lock only.

Received means: written, so that it outlives this process; `sync` makes it outlive the machine.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from loramux_adapters.errors import AdapterError, AdapterInvalid, UploadOffset
from loramux_adapters.store.disk import Disk, storage_errors
from loramux_adapters.store.records import FileEntry, FileProgress, StagedFiles, UploadManifest, UploadProgress

# Dirty pages of one upload are bounded, and a failing disk is noticed on the way, not at the end only.
_SYNC_BYTES = 16 << 20
MANIFEST_FILE = "upload.json"

_log = logging.getLogger(__name__)


class StagedUpload:
    """State of one upload. `lock` is the caller's to hold; `closed` means it was published or discarded."""

    def __init__(self, directory: Path, manifest: UploadManifest, disk: Disk) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self._directory = directory
        self._manifest = manifest
        self._disk = disk
        self._entries = {entry.file: entry for entry in manifest.files}
        self._received = dict.fromkeys(self._entries, 0)
        self._durable = dict.fromkeys(self._entries, 0)  # synced, as far as this process knows
        self._torn: set[str] = set()  # files that may be longer than received
        self._verified = False

    @classmethod
    def create(cls, directory: Path, manifest: UploadManifest, disk: Disk) -> StagedUpload:
        """Make the directory durable and return an empty upload. OSError."""
        upload = cls(directory, manifest, disk)
        disk.remove_tree(directory)  # what a process that died here left
        disk.make_directory(directory)
        upload._write_manifest()
        disk.sync(directory.parent)
        disk.sync(directory.parent.parent)
        return upload

    @classmethod
    def restore(cls, directory: Path, disk: Disk) -> StagedUpload | None:
        """The upload an earlier process left in `directory`, None if there is no whole one. OSError.

        What is on the disk after syncing it is what is received. Should a power cut have left a tail
        of wrong bytes, the hash at the publish finds it.
        """
        try:
            with disk.open(directory / MANIFEST_FILE) as stream:
                manifest = _decode(stream.read())
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        upload = cls(directory, manifest, disk)
        for entry in manifest.files:
            path = directory / entry.file
            size = disk.size(path)
            if size > entry.size:
                disk.truncate(path, entry.size)
                size = entry.size
            if size:
                disk.sync(path)
            upload._received[entry.file] = upload._durable[entry.file] = size
        return upload

    @property
    def manifest(self) -> UploadManifest:
        """What the upload will be."""
        return self._manifest

    def resume(self, manifest: UploadManifest) -> bool:
        """Continue with a manifest of the same name and files, taking all else from it; False if they differ."""
        if (manifest.name, set(manifest.files)) != (self._manifest.name, set(self._manifest.files)):
            return False
        if manifest != self._manifest:
            self._manifest = manifest
            with storage_errors("resume an upload"):
                self._write_manifest()
        return True

    def progress(self, upload_id: str) -> UploadProgress:
        """Received bytes per file, in the manifest's order."""
        return UploadProgress(
            upload_id,
            self._manifest.name,
            tuple(FileProgress(e.file, self._received[e.file], e.size) for e in self._manifest.files),
        )

    def write(self, file: str, offset: int, data: bytes) -> int:
        """Append; see AdapterStore.write_chunk. A failure leaves the received size as it was, or, when a sync
        failed, at what was synced before."""
        entry = self._entry(file)
        received = self._received[file]
        if offset != received:
            raise UploadOffset(f"the next byte of {file} is {received}, not {offset}", received=received, subject=file)
        if offset + len(data) > entry.size:
            raise AdapterInvalid(f"{file} would have more than its {entry.size} bytes", subject=file)
        self._mend(file)
        if not data:
            return received
        self._torn.add(file)
        self._verified = False
        with storage_errors("keep an upload"):
            self._disk.write_at(self._directory / file, offset, data)
        self._torn.discard(file)
        self._received[file] = received + len(data)
        if self._received[file] - self._durable[file] >= _SYNC_BYTES:
            self._sync_file(file)
        return self._received[file]

    def sync(self) -> None:
        """Bring every received byte to the disk. StoreUnavailable: the affected file fell back."""
        for file in self._entries:
            self._mend(file)
            if self._received[file] > self._durable[file]:
                self._sync_file(file)
        with storage_errors("keep an upload"):
            self._disk.sync(self._directory)

    @property
    def verified(self) -> bool:
        """Whether every file was compared with its hash since it last changed."""
        return self._verified

    def verify(self) -> None:
        """AdapterInvalid naming the first file that is short, or wrong; a wrong one starts again at 0."""
        if self._verified:
            return
        for entry in self._manifest.files:
            if self._received[entry.file] < entry.size:
                raise AdapterInvalid(
                    f"{entry.file} has {self._received[entry.file]} of its {entry.size} bytes",
                    subject=entry.file,
                    remedy="send the rest, then commit",
                )
        for entry in self._manifest.files:
            path = self._directory / entry.file
            with storage_errors("read an upload"):
                intact = self._disk.size(path) == entry.size and self._disk.sha256(path) == entry.sha256
                if not intact:
                    self._disk.remove(path)
            if not intact:
                self._received[entry.file] = self._durable[entry.file] = 0
                raise AdapterInvalid(
                    f"the bytes of {entry.file} do not have the declared sha256",
                    subject=entry.file,
                    remedy="send this file again from offset 0",
                )
        self._verified = True

    def staged(self) -> StagedFiles:
        """The verified files."""
        self.verify()
        return StagedFiles(self._manifest, {file: self._directory / file for file in self._entries})

    def remove(self) -> None:
        """Close the upload and remove its directory; what cannot be removed now is swept at a later start."""
        self.closed = True
        try:
            # The manifest first: without it the rest is no upload any more, whatever happens next.
            self._disk.remove(self._directory / MANIFEST_FILE)
            self._disk.remove_tree(self._directory)
        except OSError as error:
            _log.warning("an ended upload could not be removed: %s", error.strerror)

    def _entry(self, file: str) -> FileEntry:
        if file not in self._entries:
            raise AdapterInvalid(f"the manifest has no file {file[:80]!a}", subject="file")
        return self._entries[file]

    def _mend(self, file: str) -> None:
        """Cut off what a failed write left behind the received bytes."""
        if file in self._torn:
            path = self._directory / file
            with storage_errors("keep an upload"):
                if self._disk.size(path) > self._received[file]:
                    self._disk.truncate(path, self._received[file])
            self._torn.discard(file)

    def _sync_file(self, file: str) -> None:
        try:
            with storage_errors("keep an upload"):
                self._disk.sync(self._directory / file)
        except AdapterError:
            # After a failed fsync Linux may call lost pages clean: only what an earlier one covered is sure.
            self._received[file] = self._durable[file]
            self._torn.add(file)
            self._verified = False
            raise
        self._durable[file] = self._received[file]

    def _write_manifest(self) -> None:
        self._disk.replace_file(self._directory / MANIFEST_FILE, _encode(self._manifest))


def _encode(manifest: UploadManifest) -> bytes:
    return json.dumps(
        {
            "name": manifest.name,
            "files": [[entry.file, entry.size, entry.sha256] for entry in manifest.files],
            "labels": dict(manifest.labels),
            "allow_base_mismatch": manifest.allow_base_mismatch,
            "ttl_seconds": manifest.ttl_seconds,
            "max_uses": manifest.max_uses,
            "if_version": manifest.if_version,
        }
    ).encode()


def _decode(data: bytes) -> UploadManifest:
    fields = json.loads(data)
    return UploadManifest(
        name=fields["name"],
        files=tuple(FileEntry(*entry) for entry in fields["files"]),
        labels=fields["labels"],
        allow_base_mismatch=fields["allow_base_mismatch"],
        ttl_seconds=fields.get("ttl_seconds"),  # older ones have none
        max_uses=fields.get("max_uses"),
        if_version=fields.get("if_version"),
    )

"""What a pull receives: checked file names, contiguous chunks, sha256 of every file, then renames, the config's last.

Writes into one directory or, for a verification, nowhere. Knows no channel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from loramux.adapter_directory import CONFIG
from loramux.errors import LocalFilesError, TransferError
from loramux.types import FileEntry, ProgressCallback, Pulled, TransferProgress
from loramux.upload import FILES
from loramux_protos.v1 import adapters_pb2


def find_existing(directory: Path) -> list[str]:
    """The files in `directory` that a pull into it would replace or remove. OSError."""
    return [file for file in FILES if (directory / file).exists()]


class Download:
    """Feed it every message of DownloadAdapter, then `finish()`; leaving the `with` without it leaves no file.

    `directory` None checks the bytes and keeps none. Existing files are refused unless `overwrite`. Entering the `with`
    refuses a directory that cannot take the files, so that nothing is asked of the server for it.
    Raises TransferError for what the server sent wrong, LocalFilesError for what cannot be written.
    """

    def __init__(self, directory: Path | None, *, overwrite: bool = False, report: ProgressCallback | None = None):
        self._directory = directory
        self._overwrite = overwrite
        self._report = report
        self._digest = ""
        self._files: dict[str, FileEntry] = {}
        self._received: dict[str, int] = {}
        self._hashes: dict[str, hashlib._Hash] = {}
        self._parts: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        if self._directory is not None:
            self._check_target(self._directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts.values():
            # Closing flushes, and a full disk fails again here: that must neither hide the cause nor keep the part.
            with contextlib.suppress(OSError):
                part.close()
            with contextlib.suppress(OSError):
                os.unlink(part.name)

    def feed(self, response: adapters_pb2.DownloadAdapterResponse) -> None:
        """Take one message."""
        step = response.WhichOneof("step")
        if step == "manifest" and not self._files:
            self._begin(response.manifest)
        elif step == "chunk" and self._files:
            self._append(response.chunk)
        else:
            raise TransferError(f"the server sent {step or 'an empty message'} out of order")

    def finish(self) -> Pulled:
        """Check that every announced byte came and is right; then the files appear under their names."""
        if not self._files:
            raise TransferError("the server sent no manifest")
        for entry in self._files.values():
            if self._received[entry.file] != entry.size:
                raise TransferError(f"{entry.file} ended after {self._received[entry.file]} of {entry.size} bytes")
            if self._hashes[entry.file].hexdigest() != entry.sha256:
                raise TransferError(
                    f"{entry.file} does not have the announced sha256, and nothing was kept; try again, and if it "
                    "stays so the server's copy is damaged: push the adapter again"
                )
        if self._directory is not None:
            self._publish(self._directory)
        return Pulled(self._digest, self._directory, tuple(self._files.values()))

    def _begin(self, manifest: adapters_pb2.DownloadManifest) -> None:
        for entry in manifest.files:
            # The list of names is closed, so no name of a server's choosing ever reaches the file system.
            if entry.file not in FILES or entry.file in self._files:
                raise TransferError(f"the server names a file that an adapter does not have: {entry.file[:80]!r}")
            self._files[entry.file] = FileEntry(entry.file, entry.size, entry.sha256)
            self._received[entry.file] = 0
            self._hashes[entry.file] = hashlib.sha256()
        if not self._files:
            raise TransferError("the server's manifest names no file")
        self._digest = manifest.digest
        if self._directory is not None:
            self._open_parts(self._directory)

    def _check_target(self, directory: Path) -> None:
        try:
            existing = find_existing(directory)
            nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        except OSError as error:
            raise LocalFilesError(f"cannot write {error.filename}: {error.strerror}") from error
        if existing and not self._overwrite:
            remedy = "choose another directory, or replace them with overwrite=True"
            raise LocalFilesError(f"{directory} already holds {', '.join(existing)}; {remedy}")
        if not nearest.is_dir():
            raise LocalFilesError(f"cannot write {directory}: {nearest} is not a directory")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise LocalFilesError(f"cannot write {directory}: {nearest} is not writable")

    def _open_parts(self, directory: Path) -> None:
        self._check_target(directory)  # again: files may have come meanwhile
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for file in self._files:
                self._parts[file] = (directory / f".{file}.part").open("wb")
        except OSError as error:
            raise LocalFilesError(f"cannot write {error.filename}: {error.strerror}") from error

    def _append(self, chunk: adapters_pb2.UploadChunk) -> None:
        entry = self._files.get(chunk.file)
        if entry is None:
            raise TransferError(f"the server sent bytes of a file it did not announce: {chunk.file[:80]!r}")
        received = self._received[entry.file]
        if chunk.offset != received or received + len(chunk.data) > entry.size:
            raise TransferError(f"{entry.file}: bytes at {chunk.offset} where {received} of {entry.size} had come")
        self._hashes[entry.file].update(chunk.data)
        self._received[entry.file] = received + len(chunk.data)
        if entry.file in self._parts:
            try:
                self._parts[entry.file].write(chunk.data)
            except OSError as error:
                raise LocalFilesError(f"cannot write {self._parts[entry.file].name}: {error.strerror}") from error
        if self._report is not None:
            total = sum(f.size for f in self._files.values())
            self._report(TransferProgress(entry.file, sum(self._received.values()), total))

    def _publish(self, directory: Path) -> None:
        try:
            for part in self._parts.values():
                part.flush()
                os.fsync(part.fileno())
                part.close()
            # A directory without a config is no adapter: where this is cut, none is there, never a mix of two.
            (directory / CONFIG).unlink(missing_ok=True)
            for file in FILES:  # what the adapter that is replaced had, and this one does not have
                if file not in self._parts:
                    (directory / file).unlink(missing_ok=True)
            for file in sorted(self._parts, key=lambda file: file == CONFIG):
                os.replace(self._parts[file].name, directory / file)
        except OSError as error:
            raise LocalFilesError(f"cannot write {directory}: {error.strerror}") from error
        self._parts.clear()

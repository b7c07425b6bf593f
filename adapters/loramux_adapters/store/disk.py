"""The few file operations the store is made of, each one step that may fail or be the last.

Everything the store does to files goes through a `Disk`, so that a test can fail or end the
process at any step. Knows nothing of adapters.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loramux_adapters.errors import StoreFull, StoreUnavailable

_READ_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REASONS = {
    errno.ENOSPC: ("its disk is full", "free some space (deleting adapters works) and try again"),
    errno.EDQUOT: ("its disk quota is used up", "free some space (deleting adapters works) and try again"),
    errno.EROFS: ("it is read-only", "make it writable and try again"),
    errno.EACCES: ("permission is denied", "give the server's user access to it"),
    errno.EPERM: ("permission is denied", "give the server's user access to it"),
    errno.EMFILE: ("too many files are open", "try again later"),
    errno.EIO: ("its disk reports errors", "look at the system's log"),
}


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an OSError into StoreUnavailable: "the store cannot <action>: <reason>", without any path."""
    try:
        yield
    except OSError as error:
        reason, remedy = _REASONS.get(error.errno or 0, (error.strerror or type(error).__name__, "look at its log"))
        kind = StoreFull if error.errno in _FULL else StoreUnavailable
        raise kind(f"the store cannot {action}: {reason}", subject="store", remedy=remedy) from error


class Disk:
    """The real one. Every method raises OSError."""

    def make_directory(self, path: Path) -> None:
        """Create `path` and missing parents, for this user alone."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`, creating the file; a failure may leave a part of it."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def allocate(self, path: Path, size: int) -> None:
        """Make a file of zeros that really holds `size` bytes of the disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Return when a file's bytes, or a directory's entries, are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError if `target` is there."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source` in one step. Afterwards `source` is gone."""
        os.replace(source, target)
        # POSIX: renaming one name of a file to another name of the same file does nothing at all.
        source.unlink(missing_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file; an absent one is no error."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all below, or a file; an absent one is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading."""
        return path.open("rb")

    def size(self, path: Path) -> int:
        """Bytes of a file, 0 for an absent one."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def modified(self, path: Path) -> float:
        """When a file or directory last changed, in seconds since the epoch."""
        return path.stat().st_mtime

    def children(self, path: Path) -> list[Path]:
        """What lies directly in a directory, sorted; nothing if it is absent."""
        try:
            return sorted(path.iterdir())
        except FileNotFoundError:
            return []

    def sha256(self, path: Path) -> str:
        """The hash of a file's bytes as they are now, 64 hex digits."""
        digest = hashlib.sha256()
        with self.open(path) as stream:
            while data := stream.read(_READ_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def replace_file(self, path: Path, data: bytes) -> None:
        """Write a small file so that it has its old or its new content, whatever happens."""
        temporary = path.with_name(path.name + ".tmp")
        self.remove(temporary)
        self.write_at(temporary, 0, data)
        self.sync(temporary)
        self.rename(temporary, path)
        self.sync(path.parent)

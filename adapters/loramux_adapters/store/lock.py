"""One process per store directory: an advisory lock that ends with its process, however it ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store.disk import storage_errors


class DirectoryLock:
    """Held from construction to `release`. StoreUnavailable names the process that has it already."""

    def __init__(self, directory: Path) -> None:
        with storage_errors("be locked"):
            self._descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(OSError):  # whose it is, for a message only: a full disk must not refuse the start
                    os.ftruncate(self._descriptor, 0)
                    os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
            except BlockingIOError as error:
                holder = os.pread(self._descriptor, 20, 0).decode(errors="replace") or "unknown"
                os.close(self._descriptor)
                raise StoreUnavailable(
                    f"the store is in use by process {holder}",
                    subject="store",
                    remedy="stop that process or choose another store directory (--data-dir)",
                ) from error
            except BaseException:
                os.close(self._descriptor)
                raise

    def release(self) -> None:
        """Let another process in. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

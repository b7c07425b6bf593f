"""The move of a store from the default directory of the project's former name."""

from __future__ import annotations

import os
from pathlib import Path

from loramux_adapters.former_name import DIRECTORY
from loramux_adapters.store.disk import storage_errors
from loramux_adapters.store.lock import DirectoryLock

_CATALOG = "catalog.sqlite3"


def move_former(directory: Path) -> Path | None:
    """Move the store of the former default directory to `directory`, the present one; where it was, if it was moved.

    Nothing happens where there is none, or where `directory` holds anything. Raises StoreUnavailable while another
    process uses the former one.
    """
    former = directory.with_name(DIRECTORY)
    if not (former / _CATALOG).exists() or (directory.exists() and any(directory.iterdir())):
        return None
    lock = DirectoryLock(former)
    try:
        with storage_errors("be moved"):
            os.rename(former, directory)  # an empty directory gives way
    finally:
        lock.release()
    return former

"""Space kept for the one thing that must work on a full disk: deleting.

A catalog's transaction needs a few pages of log before it can free anything. What other processes take of the space
given up is gone, so it is given up in parts.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loramux_adapters.errors import StoreFull
from loramux_adapters.store.disk import Disk

T = TypeVar("T")

RESERVED_BYTES = 1 << 20
_PART_BYTES = 128 << 10
_PAGE_BYTES = 4 << 10
_log = logging.getLogger(__name__)


class Reserve:
    """A file of zeros that is given up when the disk is full. Serialized by the caller."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._path = root / "reserve"
        self._disk = disk

    def fill(self) -> None:
        """Take the space, or as much of it as there is; the next call tries again."""
        try:
            held = self._disk.size(self._path)
            part = RESERVED_BYTES - held
            while held < RESERVED_BYTES and part >= _PAGE_BYTES:
                try:
                    self._disk.allocate(self._path, held + part)
                    held += part
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    part //= 2
        except OSError as error:
            _log.warning("no space can be kept for deletes: %s", error.strerror)

    def spend_on(self, change: Callable[[], T]) -> T:
        """Make a change that can free space; on a full disk, in the space kept for it. Raises what `change` raises."""
        while True:
            try:
                return change()
            except StoreFull:
                if not self.release():
                    raise

    def release(self) -> bool:
        """Give a part of the space up; whether there was any."""
        try:
            held = self._disk.size(self._path)
            if held > _PART_BYTES:
                self._disk.truncate(self._path, held - _PART_BYTES)
            else:
                self._disk.remove(self._path)
        except OSError as error:
            _log.warning("the space kept for deletes cannot be given up: %s", error.strerror)
            return False
        return held > 0

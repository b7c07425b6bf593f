"""Complete files that the catalog does not know, kept for a week in `<root>/lost/<day>/<sha256>`.

An unfinished publish leaves such files, and so does a catalog whose write-ahead log was lost or torn: then they are
acknowledged adapters. `restore` writes them out as directories. What lies in `lost/` itself is of a repair and stays.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from loramux_adapters.store.disk import Disk

DIRECTORY = "lost"
KEEP_DAYS = 7
_log = logging.getLogger(__name__)
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


class Lost:
    """The caller serializes the calls."""

    def __init__(self, root: Path, disk: Disk, clock: Callable[[], float]) -> None:
        self._root = root / DIRECTORY
        self._disk = disk
        self._clock = clock

    def take(self, blobs: Sequence[Path]) -> None:
        """Move blobs here and remove what has been here for longer than `KEEP_DAYS`. What fails is tried again at the
        next start: nothing of this may keep a store from opening.
        """
        try:
            self._sweep()
            if blobs:
                directory = self._root / self._today().isoformat()
                self._disk.make_directory(directory)
                for blob in blobs:
                    self._disk.rename(blob, directory / blob.name)
        except OSError as error:
            _log.warning("files that the catalog does not know stay where they are: %s", error.strerror)
        if blobs:
            _log.warning(
                "%d stored files that the catalog does not know move to %s for %d days: an upload that was being "
                "published, or adapters that a damaged catalog lost; if adapters are missing: "
                "python -m loramux_adapters.store.restore %s OUTPUT_DIRECTORY",
                len(blobs),
                self._root,
                KEEP_DAYS,
                self._root.parent,
            )

    def _sweep(self) -> None:
        removed = 0
        for directory in self._disk.children(self._root):
            if _DAY.fullmatch(directory.name) and (self._today() - date.fromisoformat(directory.name)).days > KEEP_DAYS:
                removed += len(self._disk.children(directory))
                self._disk.remove_tree(directory)
        if removed:
            _log.info("%d files were in lost/ for over %d days and are removed", removed, KEEP_DAYS)

    def files(self) -> dict[str, Path]:
        """sha256 -> where it lies. OSError."""
        return lost_files(self._root.parent, self._disk)

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock(), UTC).date()


def lost_files(root: Path, disk: Disk) -> dict[str, Path]:
    """Every file set aside in a store, by its hash: at a start or by a repair."""
    found: dict[str, Path] = {}
    for path in disk.children(root / DIRECTORY):
        for file in disk.children(path) if path.is_dir() else [path]:
            found[file.name] = file
    return found

"""Files by the hash of their content, in `<root>/<first two digits>/<sha256>`.

Knows no adapter and no catalog: what is referenced is told to it. A blob is complete or absent
under its name at every moment, also after a crash. Needs a file system with hard links.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import BinaryIO

from loramux_adapters.store.disk import Disk

_TEMPORARY = ".tmp"


class Blobs:
    """Content-addressed files. The caller serializes `install`, `remove` and `sweep`; all raise OSError."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root = root
        self._disk = disk
        disk.make_directory(root)

    def path(self, sha256: str) -> Path:
        """Where a blob lies if it is there."""
        return self._root / sha256[:2] / sha256

    def exists(self, sha256: str) -> bool:
        """Whether a file has this name; says nothing of its bytes."""
        return self.path(sha256).exists()

    def install(self, source: Path, sha256: str) -> None:
        """Give an already synced file with this hash its durable name.

        Always replaces what is there, so that good bytes heal rotten ones; readers that have the old
        file open keep it. The source stays, as a second name of the same file.
        """
        target = self.path(sha256)
        temporary = target.with_name(sha256 + _TEMPORARY)
        self._disk.make_directory(target.parent)
        self._disk.remove(temporary)
        self._disk.link(source, temporary)
        self._disk.rename(temporary, target)
        self._disk.sync(target.parent)
        # Always: the directory may have been made by a process that died before it synced this one.
        self._disk.sync(self._root)

    def remove(self, sha256: str) -> None:
        """Remove a blob; an absent one is no error."""
        self._disk.remove(self.path(sha256))

    def is_intact(self, sha256: str) -> bool:
        """Whether the bytes are there and still have their hash. OSError if they cannot be read."""
        try:
            return self._disk.sha256(self.path(sha256)) == sha256
        except FileNotFoundError:
            return False

    def open(self, sha256: str) -> BinaryIO:
        """Open for reading; FileNotFoundError if absent."""
        return self._disk.open(self.path(sha256))

    def is_empty(self) -> bool:
        """Whether not one blob is stored."""
        return not any(self._disk.children(shard) for shard in self._disk.children(self._root))

    def sweep(self, keep: Set[str]) -> list[Path]:
        """Remove what no install finished; returns the complete blobs that are not in `keep`."""
        unknown = []
        for shard in self._disk.children(self._root):
            for file in self._disk.children(shard):
                if file.name.endswith(_TEMPORARY):
                    self._disk.remove(file)
                elif file.name not in keep:
                    unknown.append(file)
        return unknown

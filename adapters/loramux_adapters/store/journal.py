"""What was published under which name, beside the catalog: so that bytes the catalog lost can be named again.

One JSON line per publish in `<root>/published.jsonl`. Never read to serve anything: the catalog alone says what is
there. A torn line is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.store.disk import Disk

FILE_NAME = "published.jsonl"
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class Publication:
    """One publish: `files` is file -> sha256."""

    tenant: str
    name: str
    digest: str
    files: Mapping[str, str]


class Journal:
    """The caller serializes `append` and `shorten`; all raise OSError."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._path = root / FILE_NAME
        self._disk = disk
        self._rewrite_above = _SMALL_BYTES

    def append(self, publication: Publication) -> None:
        """Add a line durably."""
        # A newline before it too: what a killed process left of its last line must not swallow this one.
        self._disk.write_at(self._path, self._disk.size(self._path), b"\n" + _encode(publication))
        self._disk.sync(self._path)

    @property
    def is_large(self) -> bool:
        """Whether it has outgrown what it was when it was last shortened."""
        return self._disk.size(self._path) > self._rewrite_above

    def shorten(self, kept: Sequence[Publication], lost: Set[str]) -> None:
        """Hold what names keep, and of what was published before, that which names a file in `lost` (hashes)."""
        known = {(entry.tenant, entry.name, entry.digest) for entry in kept}
        older = [
            entry
            for entry in read_journal(self._path.parent, self._disk)
            if (entry.tenant, entry.name, entry.digest) not in known and not lost.isdisjoint(entry.files.values())
        ]
        data = b"".join(map(_encode, (*older, *kept)))
        if self._disk.size(self._path) != len(data) or self._bytes() != data:
            self._disk.replace_file(self._path, data)
        self._rewrite_above = max(_SMALL_BYTES, 2 * len(data))

    def _bytes(self) -> bytes:
        try:
            with self._disk.open(self._path) as stream:
                return stream.read()
        except FileNotFoundError:
            return b""


def read_journal(root: Path, disk: Disk) -> list[Publication]:
    """The whole lines of a store's journal, the oldest first; none if there is no journal. OSError."""
    try:
        with disk.open(root / FILE_NAME) as stream:
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return []
    return [publication for line in lines if (publication := _decode(line)) is not None]


def _encode(publication: Publication) -> bytes:
    fields = {**vars(publication), "files": dict(publication.files)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _decode(line: bytes) -> Publication | None:
    try:
        return Publication(**json.loads(line))
    except (ValueError, TypeError):
        return None

"""A full disk at each moment of an upload, of adapters of every kind: what is there stays, and the same upload goes on
once there is room."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from loramux_adapters.errors import StoreFull
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from support.corpus import KINDS
from support.crash_server import QUOTAS, Clock, Operation, StoredAdapter, load_corpus, perform
from support.names_model import NamesModel, look
from support.small_disk import fill, small_disk
from support.stores import TENANT, Fault, FaultyConnection, SteppedDisk, blob_files, entries_of, manifest_of, send

FULL = "(its disk is full|no space left on its disk); free some space"
ENDS = {"ttl": 1000.0, "max_uses": 3}


CASES = (*KINDS, "ephemeral")


class FullCatalog(FaultyConnection):
    """A catalog whose commits find no space while `statement` is COMMIT."""


def connect(path: Path, busy: float) -> sqlite3.Connection:
    return schema.connect(path, busy, factory=FullCatalog)


class Uploads:
    """A store on a small disk, and the upload `operation` over an older version, step by step."""

    def __init__(self, root: Path, corpus: dict[str, StoredAdapter]) -> None:
        self.root, self.corpus = root, corpus
        self.operation = Operation("publish")
        self.fault = Fault()
        self.clock = Clock()
        self.store = self._open()
        self._ballast = root / "ballast"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def begin(self) -> None:
        operation = self.operation
        manifest = manifest_of(operation.name, self._files, ttl_seconds=operation.ttl, max_uses=operation.max_uses)
        self.store.begin_upload(TENANT, operation.upload_id, manifest)

    def send(self) -> None:
        send(self.store, self.operation.upload_id, self._files)
        self.store.staged_files(TENANT, self.operation.upload_id)

    def publish(self, operation: Operation | None = None) -> None:
        """From wherever the upload is; or another change."""
        perform(self.store, self.corpus, operation or self.operation, self.clock)

    def reopen(self) -> None:
        self.store.close()
        self.store = self._open()

    def fill_disk(self) -> None:
        with self._ballast.open("ab", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            fill(stream)

    def make_room(self) -> None:
        self._ballast.unlink()

    def look(self) -> NamesModel:
        return look(self.store, self.corpus, self.clock())

    @property
    def _files(self) -> dict[str, bytes]:
        return dict(self.corpus[self.operation.adapter].files)

    def _open(self) -> LocalStore:
        return LocalStore(self.root, QUOTAS, disk=SteppedDisk(self.fault), connect=connect, clock=self.clock)


def at_begin(uploads: Uploads) -> None:
    uploads.fill_disk()
    with pytest.raises(StoreFull, match=FULL):
        uploads.begin()


def at_chunk(uploads: Uploads) -> None:
    uploads.begin()
    uploads.fill_disk()
    with pytest.raises(StoreFull, match=FULL):
        uploads.send()


def at_fsync(uploads: Uploads) -> None:
    """Where the file system gives bytes a place on the disk only now."""
    uploads.begin()
    uploads.send()
    uploads.fill_disk()
    uploads.fault.arm(errno.ENOSPC, "sync")
    with pytest.raises(StoreFull, match=FULL):
        uploads.publish()
    uploads.fault.clear()


def at_install(uploads: Uploads) -> None:
    """A directory may need another block for one more name."""
    uploads.begin()
    uploads.send()
    uploads.fill_disk()
    uploads.fault.arm(errno.ENOSPC, "link")
    with pytest.raises(StoreFull, match=FULL):
        uploads.publish()
    uploads.fault.clear()


def at_commit(uploads: Uploads) -> None:
    uploads.begin()
    uploads.send()
    uploads.fill_disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullCatalog, "statement", "COMMIT")
        with pytest.raises(StoreFull, match=FULL):
            uploads.publish()


MOMENTS: dict[str, Callable[[Uploads], None]] = {
    "begin": at_begin, "chunk": at_chunk, "fsync": at_fsync, "install": at_install, "commit": at_commit,
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_refuses_the_upload_and_harms_nothing(tmp_path: Path, corpus: Path, moment: str) -> None:
    adapters = load_corpus(corpus)
    with small_disk(tmp_path / "disk", "12m") as root, Uploads(root, adapters) as uploads:
        for number, case in enumerate(CASES):
            kind, ends = ("lora", ENDS) if case == "ephemeral" else (case, {})
            uploads.publish(Operation("publish", case, f"{kind}-0", 2 * number, **ends))
            uploads.publish(Operation("alias", case, alias=f"{case}-alias"))
            old = uploads.look()

            uploads.operation = Operation("publish", case, f"{kind}-1", 2 * number + 1, **ends)
            MOMENTS[moment](uploads)
            assert uploads.look() == old, case
            uploads.reopen()  # on the full disk
            assert uploads.look() == old, case

            uploads.make_room()
            uploads.publish()
            new = uploads.look()
            assert new == old.after(uploads.operation, uploads.clock()), case
            stored = {entry.sha256 for each in new.names.values() for entry in entries_of(adapters[each.adapter].files)}
            assert blob_files(root) == stored, case
            assert not list((root / "uploads" / TENANT).iterdir()), case
        assert len(new.names) == len(new.aliases) == len(CASES)

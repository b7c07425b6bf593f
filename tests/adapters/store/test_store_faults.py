"""A disk that is full, read-only or failing: a clear error, old versions served, recovery."""

import errno
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    StoreUnavailable,
    UploadOffset,
)
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, Published
from support.small_disk import fill, small_disk
from support.stores import (
    BASE,
    CONFIG,
    MODEL,
    TENANT,
    Fault,
    FaultyConnection,
    SteppedDisk,
    blob_files,
    content,
    digest_of,
    manifest_of,
    new_id,
    put,
    send,
    spec_of,
    stage,
    stored,
)

OLD, NEW = content("old"), content("new")
REASONS = {errno.ENOSPC: "full", errno.EROFS: "read-only", errno.EIO: "reports errors", errno.EDQUOT: "quota"}


def upload(store: LocalStore, upload_id: str) -> Published:
    """All of it, or what an earlier attempt left to do."""
    store.begin_upload(TENANT, upload_id, manifest_of("one", NEW))
    send(store, upload_id, NEW)
    store.staged_files(TENANT, upload_id)
    return store.publish(TENANT, upload_id, spec_of(NEW), BASE)


@pytest.mark.parametrize("error", REASONS)
@pytest.mark.parametrize("operation", ["make_directory", "write", "write_rest", "sync", "link", "rename", "remove"])
def test_whatever_fails_is_said_and_costs_nothing_acknowledged(tmp_path: Path, operation: str, error: int) -> None:
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        put(store, "one", OLD)
        upload_id = new_id()
        fault.arm(error, operation)
        with pytest.raises(StoreUnavailable, match=REASONS[error]) as caught:
            upload(store, upload_id)
        assert str(tmp_path) not in str(caught.value)
        record = store.get(TENANT, "one")
        assert record.digest == digest_of(OLD)
        assert stored(store, record.digest) == OLD
        fault.clear()
        assert upload(store, upload_id).created
        assert stored(store, digest_of(NEW)) == NEW
    with LocalStore(tmp_path) as store:
        assert store.get(TENANT, "one").digest == digest_of(NEW)
        assert len(blob_files(tmp_path)) == 4


@pytest.mark.parametrize("operation", ["write", "write_rest"])
def test_a_chunk_that_failed_half_way_was_not_written(tmp_path: Path, operation: str) -> None:
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        store.begin_upload(TENANT, "upload-0001", manifest_of("one", NEW))
        store.write_chunk(TENANT, "upload-0001", MODEL, 0, NEW[MODEL][:1000])
        fault.arm(errno.ENOSPC, operation)
        with pytest.raises(StoreUnavailable, match="free some space"):
            store.write_chunk(TENANT, "upload-0001", MODEL, 1000, NEW[MODEL][1000:3000])
        with pytest.raises(UploadOffset) as caught:
            store.write_chunk(TENANT, "upload-0001", MODEL, 3000, NEW[MODEL][3000:])
        assert caught.value.received == 1000
        fault.clear()
        assert store.query_upload(TENANT, "upload-0001").files[1].received == 1000
        assert (tmp_path / "uploads" / TENANT / "upload-0001" / MODEL).stat().st_size == 1000
        store.write_chunk(TENANT, "upload-0001", MODEL, 1000, NEW[MODEL][1000:])
        send(store, "upload-0001", NEW)
        assert store.staged_files(TENANT, "upload-0001").files[MODEL].read_bytes() == NEW[MODEL]


def test_after_a_failed_sync_only_what_an_earlier_one_covered_counts(tmp_path: Path) -> None:
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        store.begin_upload(TENANT, "upload-0001", manifest_of("one", NEW))
        store.write_chunk(TENANT, "upload-0001", MODEL, 0, NEW[MODEL][:1000])
        assert store.query_upload(TENANT, "upload-0001").files[1].received == 1000
        store.write_chunk(TENANT, "upload-0001", MODEL, 1000, NEW[MODEL][1000:2000])
        fault.arm(errno.EIO, "sync")
        with pytest.raises(StoreUnavailable):
            store.query_upload(TENANT, "upload-0001")
        fault.clear()
        assert store.query_upload(TENANT, "upload-0001").files[1].received == 1000
        send(store, "upload-0001", NEW)
        assert store.staged_files(TENANT, "upload-0001").files[MODEL].read_bytes() == NEW[MODEL]


def test_what_a_failed_sync_took_back_is_compared_with_its_hash_again(tmp_path: Path) -> None:
    """The bytes sent in their place may be others: never published under the hash of the first."""
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        upload_id = stage(store, "one", NEW)
        fault.arm(errno.EIO, "sync")
        with pytest.raises(StoreUnavailable):
            store.publish(TENANT, upload_id, spec_of(NEW), BASE)
        fault.clear()
        with pytest.raises(AdapterConflict, match="not staged"):
            store.publish(TENANT, upload_id, spec_of(NEW), BASE)
        send(store, upload_id, {file: data[::-1] for file, data in NEW.items()})
        with pytest.raises(AdapterInvalid, match="do not have the declared sha256"):
            store.staged_files(TENANT, upload_id)


class Faulty(FaultyConnection):
    """This module's own switch."""


def connect(path: Path, busy: float) -> sqlite3.Connection:
    return schema.connect(path, busy, factory=Faulty)


@pytest.fixture
def failing_catalog() -> Iterator[type[Faulty]]:
    yield Faulty
    Faulty.statement = ""


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO versions", "INSERT INTO history", "COMMIT"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [(sqlite3.SQLITE_FULL, "no space"), (sqlite3.SQLITE_IOERR_FSYNC, "read or written"), (sqlite3.SQLITE_BUSY, "lock")],
)
def test_a_catalog_that_cannot_commit_shows_nothing_and_recovers(
    tmp_path: Path, failing_catalog: type[Faulty], statement: str, code: int, reason: str
) -> None:
    with LocalStore(tmp_path, connect=connect) as store:
        put(store, "one", OLD)
        upload_id = stage(store, "one", NEW)
        failing_catalog.statement, failing_catalog.code = statement, code
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=reason):
                store.publish(TENANT, upload_id, spec_of(NEW), BASE)
        assert stored(store, store.acquire(TENANT, "one").digest) == OLD
        failing_catalog.statement = ""
        assert store.publish(TENANT, upload_id, spec_of(NEW), BASE).created
        assert stored(store, digest_of(NEW)) == NEW


def test_files_of_a_failed_commit_go_once_that_commit_cannot_come_back(
    tmp_path: Path, failing_catalog: type[Faulty]
) -> None:
    with LocalStore(tmp_path, connect=connect) as store:
        upload_id = stage(store, "one", NEW)
        failing_catalog.statement, failing_catalog.code = "COMMIT", sqlite3.SQLITE_IOERR
        with pytest.raises(StoreUnavailable):
            store.publish(TENANT, upload_id, spec_of(NEW), BASE)
        store.discard_upload(TENANT, upload_id)
        assert len(blob_files(tmp_path)) == 2
        failing_catalog.statement = ""
        put(store, "two", OLD)
        assert len(blob_files(tmp_path)) == 2
        assert stored(store, digest_of(OLD)) == OLD


def test_a_failing_collection_does_not_fail_the_delete_before_it(tmp_path: Path, failing_catalog: type[Faulty]) -> None:
    with LocalStore(tmp_path, connect=connect) as store:
        put(store, "one", OLD)
        failing_catalog.statement = "DELETE FROM versions"
        failing_catalog.code = sqlite3.SQLITE_FULL
        store.delete(TENANT, "one")
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "one")
        failing_catalog.statement = ""
        put(store, "two", NEW)
        assert len(blob_files(tmp_path)) == 2


def test_files_that_cannot_be_removed_are_left_for_the_next_start(tmp_path: Path) -> None:
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        put(store, "one", OLD)
        upload_id = stage(store, "one", NEW)
        fault.arm(errno.EIO, "remove", "remove_tree")
        store.delete(TENANT, "one")
        store.discard_upload(TENANT, upload_id)
        assert len(blob_files(tmp_path)) == 2
    with LocalStore(tmp_path) as store:
        assert blob_files(tmp_path) == set()
        assert store.list(TENANT).records == ()


def test_a_start_that_fails_leaves_the_store_free(tmp_path: Path) -> None:
    fault = Fault()
    fault.arm(errno.EROFS, "make_directory")
    with pytest.raises(StoreUnavailable, match="read-only"):
        LocalStore(tmp_path, disk=SteppedDisk(fault))
    with LocalStore(tmp_path) as store:
        put(store, "one", OLD)
    (tmp_path / "blobs" / "00").mkdir(exist_ok=True)
    (tmp_path / "blobs" / "00" / "orphan.tmp").write_bytes(b"x")
    fault.arm(errno.EIO, "remove")
    with pytest.raises(StoreUnavailable):
        LocalStore(tmp_path, disk=SteppedDisk(fault))
    with LocalStore(tmp_path) as store:
        assert stored(store, store.get(TENANT, "one").digest) == OLD


def change_often(store: LocalStore) -> None:
    """Make the catalog's log need another page."""
    for number in range(10_000):
        store.update(TENANT, "one", AdapterUpdate(set_labels={"n": str(number)}))


def test_a_really_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as root, LocalStore(root) as store:
        put(store, "one", OLD)
        ballast = root / "ballast"
        with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
            fill(stream)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="space"):
                put(store, "two", content("two", 100_000))
        with pytest.raises(StoreUnavailable, match="space"):
            change_often(store)
        assert stored(store, store.acquire(TENANT, "one").digest) == OLD
        ballast.unlink()
        assert put(store, "two", content("two", 100_000)).created
        assert stored(store, digest_of(content("two", 100_000))) == content("two", 100_000)


def test_a_really_full_disk_in_mid_upload(tmp_path: Path) -> None:
    large = {CONFIG: b"{}", MODEL: os.urandom(3 << 20)}
    with small_disk(tmp_path / "disk", "2m") as root, LocalStore(root) as store:
        put(store, "one", OLD)
        store.begin_upload(TENANT, "upload-0001", manifest_of("large", large))
        with pytest.raises(StoreUnavailable, match="its disk is full; free some space"):
            send(store, "upload-0001", large, chunk=1 << 16)
        assert 0 < store.query_upload(TENANT, "upload-0001").files[1].received < 2 << 20
        assert stored(store, digest_of(OLD)) == OLD
        subprocess.run(["mount", "-o", "remount,size=16m", str(root)], check=True)
        send(store, "upload-0001", large, chunk=1 << 16)
        store.staged_files(TENANT, "upload-0001")
        assert store.publish(TENANT, "upload-0001", spec_of(large), BASE).created


def test_a_really_read_only_store_refuses_the_start(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as root:
        with LocalStore(root) as store:
            put(store, "one", OLD)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        with pytest.raises(StoreUnavailable, match="read-only"):
            LocalStore(root)
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        with LocalStore(root) as store:
            assert stored(store, store.get(TENANT, "one").digest) == OLD

"""A full disk: what frees space works on it."""

import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound, StoreFull
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.reserve import RESERVED_BYTES
from support.small_disk import fill, small_disk
from support.stores import (
    TENANT,
    Fault,
    FaultyConnection,
    SteppedDisk,
    blob_files,
    content,
    digest_of,
    put,
    stored,
)

MANY = 20


def filled_disk(root: Path) -> Path:
    """Adapters, a log that was folded away so that the next change needs new pages, and not a byte of space."""
    with LocalStore(root) as store:
        for number in range(MANY):
            put(store, f"a{number}", content(f"a{number}", 20_000))
    return root / "ballast"


def take_the_rest(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        fill(stream)


def test_on_a_really_full_disk_adapters_can_be_deleted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        ballast = filled_disk(root)
        with LocalStore(root) as store:
            take_the_rest(ballast)
            with pytest.raises(StoreFull, match="deleting adapters works"):
                put(store, "new", content("new", 100_000))
            for number in range(MANY - 1):
                store.delete(TENANT, f"a{number}")
                take_the_rest(ballast)
            assert [record.id.name for record in store.list(TENANT).records] == [f"a{MANY - 1}"]
            assert len(blob_files(root)) == 2
            ballast.unlink()
            assert put(store, "new", content("new", 100_000)).created
            assert stored(store, digest_of(content("new", 100_000))) == content("new", 100_000)


def test_a_store_on_a_really_full_disk_opens(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as root:
        ballast = filled_disk(root)
        take_the_rest(ballast)
        with LocalStore(root) as store:
            take_the_rest(ballast)
            assert len(store.list(TENANT).records) == MANY
            store.delete(TENANT, "a0")
            assert len(blob_files(root)) == 2 * (MANY - 1)


class Full(FaultyConnection):
    """A catalog that finds no space while the reserve is whole."""

    root = Path()

    def execute(self, sql: str, parameters: object = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        if self.statement and (self.root / "reserve").stat().st_size < RESERVED_BYTES:
            return sqlite3.Connection.execute(self, sql, parameters)  # type: ignore[arg-type]
        return super().execute(sql, parameters)


def connect(path: Path, busy: float) -> sqlite3.Connection:
    return schema.connect(path, busy, factory=Full)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[type[Full]]:
    Full.root, Full.statement, Full.code = tmp_path, "", sqlite3.SQLITE_FULL
    yield Full
    Full.statement = ""


@pytest.mark.parametrize("statement", ["BEGIN", "DELETE FROM names", "DELETE FROM versions", "COMMIT"])
@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE])
def test_a_delete_takes_the_space_kept_for_it_and_gives_it_back(
    tmp_path: Path, full: type[Full], statement: str, code: int
) -> None:
    with LocalStore(tmp_path, connect=connect) as store:
        put(store, "one", content("one"))
        put(store, "two", content("two"))
        assert (tmp_path / "reserve").stat().st_blocks * 512 >= RESERVED_BYTES
        full.statement, full.code = statement, code
        store.delete(TENANT, "one")
        full.statement = ""
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "one")
        assert len(blob_files(tmp_path)) == 2
        assert (tmp_path / "reserve").stat().st_size == RESERVED_BYTES
        assert stored(store, digest_of(content("two"))) == content("two")


def test_an_upload_does_not_take_the_space_kept_for_deletes(tmp_path: Path, full: type[Full]) -> None:
    with LocalStore(tmp_path, connect=connect) as store:
        full.statement = "INSERT INTO versions"
        with pytest.raises(StoreFull):
            put(store, "one", content("one"))
        assert (tmp_path / "reserve").stat().st_size == RESERVED_BYTES


def test_a_disk_without_room_for_the_reserve_is_used_all_the_same(tmp_path: Path) -> None:
    fault = Fault()
    fault.arm(errno.ENOSPC, "allocate")
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        put(store, "one", content("one"))
        assert not (tmp_path / "reserve").exists()
        fault.clear()
        store.delete(TENANT, "one")
        assert (tmp_path / "reserve").stat().st_size == RESERVED_BYTES

"""Holds against delete and replace: what was resolved keeps its bytes, and nothing stays for ever."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import Quotas
from support.stores import TENANT, SteppedDisk, blob_files, content, digest_of, put, stored

FILES = content("one")
DIGEST = digest_of(FILES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path, Quotas(keep_versions=1)) as store:
        yield store


def test_a_deleted_adapter_keeps_its_bytes_until_the_last_hold(store: LocalStore, tmp_path: Path) -> None:
    put(store, "one", FILES)
    store.acquire(TENANT, "one")
    store.hold(DIGEST)
    store.delete(TENANT, "one")
    assert stored(store, DIGEST) == FILES
    with pytest.raises(AdapterNotFound):
        store.acquire(TENANT, "one")
    assert not store.release(DIGEST)
    assert store.collect() == 0
    assert stored(store, DIGEST) == FILES
    assert store.release(DIGEST)
    assert store.collect() == 1
    assert blob_files(tmp_path) == set()
    with pytest.raises(AdapterNotFound):
        store.hold(DIGEST)


def test_a_replaced_version_keeps_its_bytes_until_the_last_hold(store: LocalStore, tmp_path: Path) -> None:
    put(store, "one", FILES)
    store.acquire(TENANT, "one")
    put(store, "one", content("two"))
    assert store.acquire(TENANT, "one").digest == digest_of(content("two"))
    assert stored(store, DIGEST) == FILES
    assert store.release(DIGEST)
    store.collect()
    assert len(blob_files(tmp_path)) == 2


def test_a_held_orphan_can_be_published_again(store: LocalStore) -> None:
    put(store, "one", FILES)
    store.acquire(TENANT, "one")
    store.delete(TENANT, "one")
    assert put(store, "two", FILES).created
    assert not store.release(DIGEST)
    assert store.collect() == 0
    assert stored(store, DIGEST) == FILES


def test_holds_end_with_the_process(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        put(store, "one", FILES)
        store.acquire(TENANT, "one")
        store.delete(TENANT, "one")
    with LocalStore(tmp_path):
        assert blob_files(tmp_path) == set()


def test_a_load_during_which_the_last_hold_went_collects(tmp_path: Path) -> None:
    armed = [False]

    def hook(operation: str, path: Path) -> None:
        if operation == "open" and armed[0]:
            armed[0] = False
            assert not store.release(DIGEST)  # the load has a hold of its own

    store = LocalStore(tmp_path, disk=SteppedDisk(hook))
    with store:
        put(store, "one", FILES)
        store.acquire(TENANT, "one")
        store.delete(TENANT, "one")
        armed[0] = True
        store.files(DIGEST)
        assert blob_files(tmp_path) == set()


def test_a_release_without_a_hold_is_a_bug(store: LocalStore) -> None:
    put(store, "one", FILES)
    with pytest.raises(RuntimeError):
        store.release(DIGEST)


class SlowReader(sqlite3.Connection):
    """Calls `between` once, when a lookup has its row and its caller does not have it yet."""

    between: Callable[[], None] | None = None

    def execute(self, sql: str, parameters: object = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        cursor = super().execute(sql, parameters)  # type: ignore[arg-type]
        between = type(self).between
        if between and sql.startswith("SELECT v.digest, n.name"):
            type(self).between = None
            between()
        return cursor


def test_a_delete_between_lookup_and_hold_removes_no_bytes(tmp_path: Path) -> None:
    def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
        return schema.connect(path, busy_seconds, factory=SlowReader)

    with LocalStore(tmp_path, connect=connect) as store:
        put(store, "one", FILES)
        deleting = threading.Thread(target=store.delete, args=(TENANT, "one"))

        def between() -> None:
            deleting.start()
            deleting.join(0.5)

        SlowReader.between = between
        assert store.acquire(TENANT, "one").digest == DIGEST
        deleting.join()
        assert stored(store, DIGEST) == FILES
        with pytest.raises(AdapterNotFound):
            store.acquire(TENANT, "one")
        assert store.release(DIGEST)


def test_what_a_resolve_returned_holds_its_bytes_against_deletes_and_replaces(store: LocalStore) -> None:
    """Readers resolve and load while one thread keeps deleting and another replacing the same name."""
    versions = {digest_of(files): files for files in (content(f"v{number}") for number in range(4))}
    ended = threading.Event()
    failures: list[BaseException] = []
    loads = [0]

    def guard(work: Callable[[], None]) -> None:
        try:
            while not ended.is_set():
                work()
        except BaseException as error:
            failures.append(error)
            ended.set()

    def read() -> None:
        try:
            version = store.acquire(TENANT, "one")
        except AdapterNotFound:
            return
        assert stored(store, version.digest) == versions[version.digest]
        loads[0] += 1
        if store.release(version.digest):
            store.collect()

    def delete() -> None:
        try:
            store.delete(TENANT, "one")
        except AdapterNotFound:
            return

    def write() -> None:
        for files in versions.values():
            put(store, "one", files)

    threads = [threading.Thread(target=guard, args=(work,)) for work in (read, read, read, delete, write)]
    for thread in threads:
        thread.start()
    ended.wait(1.0)
    while loads[0] <= 10 and not failures:
        ended.wait(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert loads[0] > 10

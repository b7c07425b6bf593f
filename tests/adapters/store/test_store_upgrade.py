"""A catalog of format 1, made by the tables it was made with, becomes one of today's or stays what it was."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from loramux_adapters.errors import StoreUnavailable
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import UNKNOWN_BASE, AdapterUpdate, DesiredState
from loramux_adapters.store.repair import repair
from support.stores import BASE, TENANT, content, digest_of, put, quick_store, stored

FORMAT_1 = """
CREATE TABLE blobs (
    sha256 TEXT NOT NULL PRIMARY KEY,
    size INTEGER NOT NULL CHECK (size >= 0),
    corrupt INTEGER NOT NULL DEFAULT 0 CHECK (corrupt IN (0, 1))
) WITHOUT ROWID;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    digest TEXT NOT NULL,
    spec TEXT NOT NULL,
    files INTEGER NOT NULL,
    UNIQUE (digest, tenant)
);
CREATE TABLE version_files (
    version INTEGER NOT NULL REFERENCES versions (id) ON DELETE CASCADE,
    file TEXT NOT NULL,
    sha256 TEXT NOT NULL REFERENCES blobs (sha256),
    PRIMARY KEY (version, file)
) WITHOUT ROWID;
CREATE INDEX version_files_by_blob ON version_files (sha256);
CREATE TABLE names (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL REFERENCES versions (id),
    labels TEXT NOT NULL DEFAULT '{}',
    pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1)),
    created REAL NOT NULL,
    updated REAL NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE INDEX names_by_version ON names (version);
-- The kept versions of a name, the current one included; the highest seq is the newest.
CREATE TABLE history (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL REFERENCES versions (id),
    UNIQUE (tenant, name, version),
    FOREIGN KEY (tenant, name) REFERENCES names (tenant, name) ON DELETE CASCADE
);
CREATE INDEX history_by_version ON history (version);
CREATE TABLE aliases (
    tenant TEXT NOT NULL,
    alias TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (tenant, alias),
    FOREIGN KEY (tenant, name) REFERENCES names (tenant, name) ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX aliases_by_name ON aliases (tenant, name);
PRAGMA user_version = 1;
"""
OLD, KEPT = content("old"), content("kept")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store as the program before left it: `a` pinned, with an alias and a kept version; `b`."""
    root = tmp_path / "store"
    with quick_store(root) as store:
        put(store, "a", KEPT)
        put(store, "a", OLD, labels={"n": "1"})
        put(store, "b", content("b"))
        store.update(TENANT, "a", AdapterUpdate(pinned=True, add_aliases=("first",)))
    catalog, today = root / "catalog.sqlite3", root / "today.sqlite3"
    catalog.rename(today)
    with closing(sqlite3.connect(catalog, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FORMAT_1)
        connection.execute("ATTACH ? AS today", (str(today),))
        for table in schema.TABLES:
            columns = ", ".join(columns_of(connection, table))
            connection.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM today.{table}")
    today.unlink()
    return root


def columns_of(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA main.table_info({table})")]


def layout(root: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns in order and all indices, beside the version."""
    with closing(sqlite3.connect(root / "catalog.sqlite3")) as connection:
        tables = {table: list(connection.execute(f"PRAGMA table_info({table})")) for table in schema.TABLES}
        indices = list(connection.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index' ORDER BY 1"))
        return {**tables, "indices": indices, "version": list(connection.execute("PRAGMA user_version"))}


def check_upgraded(root: Path) -> None:
    """All that was there is there, and what is new is at its default."""
    with quick_store(root) as store:
        a, b = store.list(TENANT).records
        assert (a.id.name, a.digest, a.aliases, dict(a.labels), a.pinned) == (
            "a", digest_of(OLD), ("first",), {"n": "1"}, True,
        )  # fmt: skip
        assert (b.id.name, b.pinned) == ("b", False)
        for record in (a, b):
            assert (record.merge, record.bases) == (False, {UNKNOWN_BASE})
        assert store.desired_state() == DesiredState(pinned=frozenset({digest_of(OLD)}))
        assert store.get(TENANT, "first", digest_of(KEPT)[:8]).digest == digest_of(KEPT)
        assert stored(store, digest_of(OLD)) == OLD


def test_an_older_catalog_is_upgraded_when_it_is_opened(root: Path, tmp_path: Path) -> None:
    LocalStore(root).close()
    quick_store(tmp_path / "new").close()
    assert layout(root) == layout(tmp_path / "new")
    check_upgraded(root)
    with quick_store(root) as store:
        store.update(TENANT, "b", AdapterUpdate(merge=True))
        assert put(store, "b", content("b")).record.bases == {BASE}
    with quick_store(root) as store:
        record = store.get(TENANT, "b")
        assert (record.merge, record.bases) == (True, {BASE})


def test_an_upgrade_that_fails_leaves_the_catalog_as_it_was(root: Path) -> None:
    def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
        connection = schema.connect(path, busy_seconds)
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_CREATE_INDEX else sqlite3.SQLITE_OK
        )
        return connection

    before = layout(root)
    with pytest.raises(StoreUnavailable):  # at the last of its statements
        LocalStore(root, connect=connect)
    assert layout(root) == before
    check_upgraded(root)


def test_killed_at_any_step_of_the_upgrade_it_is_done_at_the_next_start(root: Path, tmp_path: Path) -> None:
    before, kills = layout(root), 0
    for step in range(1, 100):
        copy = tmp_path / f"copy-{step}"
        shutil.copytree(root, copy)
        if open_and_die(copy, step):
            assert step > 10
            break
        kills += layout(copy) == before
        check_upgraded(copy)
    assert kills > 5
    assert layout(copy)["version"] == [(schema.SCHEMA_VERSION,)]


def open_and_die(root: Path, step: int) -> bool:
    """Open a store in a process that kills itself at its SQL statement number `step`; whether it got past it."""
    code = """
import itertools, os, pathlib, signal, sys
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
steps = itertools.count(1)
def trace(statement):
    if next(steps) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
def connect(path, busy_seconds):
    connection = schema.connect(path, busy_seconds)
    connection.set_trace_callback(trace)
    return connection
LocalStore(pathlib.Path(sys.argv[1]), connect=connect)
os._exit(0)
"""
    return subprocess.run([sys.executable, "-c", code, str(root), str(step)], check=False).returncode == 0


def test_a_repair_reads_an_older_catalog(root: Path) -> None:
    assert repair(root) is None  # healthy: the next start upgrades it
    report = repair(root, rebuild=True)
    assert report is not None
    assert (report.kept, report.lost, report.files_set_aside) == ((f"{TENANT}/a", f"{TENANT}/b"), (), 0)
    assert layout(root)["version"] == [(schema.SCHEMA_VERSION,)]
    check_upgraded(root)

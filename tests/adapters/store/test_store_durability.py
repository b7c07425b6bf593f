"""The order of operations that makes an acknowledged publish survive a power cut."""

import sqlite3
from pathlib import Path

from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from support.stores import BASE, TENANT, SteppedDisk, content, entries_of, manifest_of, put, spec_of, stage

FILES = content("one")


def recorded(root: Path) -> tuple[LocalStore, list[tuple[str, str]]]:
    """A store, and the list that its file operations and statements are written to, in order."""
    log: list[tuple[str, str]] = []

    def connect(path: Path, busy: float) -> sqlite3.Connection:
        connection = schema.connect(path, busy)
        connection.set_trace_callback(lambda sql: log.append(("sql", sql.split()[0])))
        return connection

    return LocalStore(root, disk=SteppedDisk(lambda *step: log.append((step[0], str(step[1])))), connect=connect), log


def test_bytes_and_their_names_are_synced_before_the_commit_and_the_upload_goes_after_it(tmp_path: Path) -> None:
    store, log = recorded(tmp_path)
    with store:
        upload_id = stage(store, "one", FILES)
        start = len(log)
        store.publish(TENANT, upload_id, spec_of(FILES), BASE)
        steps = log[start:]
        staging = tmp_path / "uploads" / TENANT / upload_id
        commit = steps.index(("sql", "COMMIT"))
        for entry in entries_of(FILES):
            blob = tmp_path / "blobs" / entry.sha256[:2] / entry.sha256
            data_synced = steps.index(("sync", str(staging / entry.file)))
            named = steps.index(("rename", str(blob)))
            directory_synced = steps.index(("sync", str(blob.parent)), named)
            parent_synced = steps.index(("sync", str(tmp_path / "blobs")), named)
            assert data_synced < named < directory_synced < parent_synced < commit
        assert commit < steps.index(("remove", str(staging / "upload.json")))


def test_bytes_go_after_the_commit_that_forgets_them(tmp_path: Path) -> None:
    store, log = recorded(tmp_path)
    with store:
        put(store, "one", FILES)
        start = len(log)
        store.delete(TENANT, "one")
        steps = log[start:]
        commits = [index for index, step in enumerate(steps) if step == ("sql", "COMMIT")]
        removals = [index for index, step in enumerate(steps) if step[0] == "remove"]
        assert len(commits) == len(removals) == 2
        assert max(commits) < min(removals)


def test_the_catalog_syncs_every_commit(tmp_path: Path) -> None:
    LocalStore(tmp_path).close()
    connection = schema.connect(tmp_path / "catalog.sqlite3", 1.0)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
        assert connection.execute("PRAGMA synchronous").fetchall() == [(2,)]
        assert connection.execute("PRAGMA foreign_keys").fetchall() == [(1,)]
    finally:
        connection.close()


def test_a_query_syncs_what_it_reports(tmp_path: Path) -> None:
    store, log = recorded(tmp_path)
    with store:
        staging = tmp_path / "uploads" / TENANT / "upload-0001"
        store.begin_upload(TENANT, "upload-0001", manifest_of("three", FILES))
        store.write_chunk(TENANT, "upload-0001", "adapter_model.safetensors", 0, b"x")
        start = len(log)
        store.query_upload(TENANT, "upload-0001")
        synced = {path for operation, path in log[start:] if operation == "sync"}
        assert {str(staging / "adapter_model.safetensors"), str(staging)} <= synced

"""Opening a store: one process at a time, a catalog that can be trusted, or the repair command."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.errors import REFUSED, AdapterNotFound, StoreCorrupt, StoreUnavailable
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate
from loramux_adapters.store.repair import Report, main, repair
from loramux_adapters.store.restore import restore
from support.stores import TENANT, blob_files, content, digest_of, put, quick_store, stored


def filled(root: Path, count: int = 3) -> None:
    with quick_store(root) as store:
        for number in range(count):
            put(store, f"a{number}", content(f"a{number}"), labels={"n": str(number)})
        store.update(TENANT, "a0", AdapterUpdate(add_aliases=("zero",), merge=True))


def repaired(root: Path, *, rebuild: bool = False) -> Report:
    report = repair(root, rebuild=rebuild)
    assert report is not None
    return report


def damage(root: Path, start: int, length: int = 4096) -> None:
    with (root / "catalog.sqlite3").open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xa5" * length)


def test_two_servers_cannot_share_a_store(tmp_path: Path) -> None:
    with LocalStore(tmp_path):
        with pytest.raises(StoreUnavailable, match=f"in use by process {os.getpid()}"):
            LocalStore(tmp_path)
        code = (
            "import sys, pathlib; from loramux_adapters.store.local import LocalStore;"
            "LocalStore(pathlib.Path(sys.argv[1]))"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "StoreUnavailable" in other.stderr
        assert "choose another store directory" in other.stderr
    LocalStore(tmp_path).close()


def test_close_is_idempotent_and_what_comes_after_is_unavailable(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable):
        store.get(TENANT, "one")
    with pytest.raises(StoreUnavailable):
        store.delete(TENANT, "one")


def test_the_store_loads_without_torch(tmp_path: Path) -> None:
    code = "import sys, loramux_adapters.store.local, loramux_server.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("start", [0, 4096, 5 * 4096])
def test_a_damaged_catalog_refuses_the_start_with_the_repair_command(tmp_path: Path, start: int) -> None:
    filled(tmp_path)
    damage(tmp_path, start)
    with pytest.raises(StoreCorrupt) as caught:
        LocalStore(tmp_path)
    assert f"python -m loramux_adapters.store.repair {tmp_path}" in caught.value.remedy
    assert len(blob_files(tmp_path)) == 6


def test_a_missing_catalog_never_costs_the_blobs(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "catalog.sqlite3").unlink()
    with pytest.raises(StoreCorrupt, match="catalog is empty"):
        LocalStore(tmp_path)
    assert len(blob_files(tmp_path)) == 6
    report = repaired(tmp_path)
    assert (report.kept, report.lost, report.files_set_aside) == ((), (), 6)
    assert len(list((tmp_path / "lost").iterdir())) == 6
    with LocalStore(tmp_path) as store:
        assert store.list(TENANT).records == ()


def test_a_catalog_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailable, match="format 99"):
        LocalStore(tmp_path)


def test_a_locked_catalog_is_unavailable_for_writers_and_readable(tmp_path: Path) -> None:
    with LocalStore(tmp_path, connect=lambda path, busy: schema.connect(path, min(busy, 0.05))) as store:
        put(store, "one", content("one"))
        with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="locked by another process; try again"):
                store.delete(TENANT, "one")
            with pytest.raises(StoreUnavailable):
                put(store, "two", content("two"))
            assert stored(store, store.acquire(TENANT, "one").digest) == content("one")
            other.execute("ROLLBACK")
        assert put(store, "two", content("two")).created
        store.delete(TENANT, "one")


def test_an_intact_store_passes_a_rebuild_unchanged(tmp_path: Path) -> None:
    filled(tmp_path)
    with LocalStore(tmp_path) as store:
        put(store, "a0", content("newer"))
        before = store.list(TENANT).records
    report = repaired(tmp_path, rebuild=True)
    assert report.kept == tuple(f"{TENANT}/a{number}" for number in range(3))
    assert (report.lost, report.files_set_aside, report.unread) == ((), 0, {})
    assert report.damaged is not None
    assert report.damaged.exists()
    with LocalStore(tmp_path) as store:
        assert store.list(TENANT).records == before
        assert store.acquire(TENANT, "zero").id.name == "a0"
        assert store.get(TENANT, "a0", digest_of(content("a0"))[:8])
        for record in before:
            stored(store, record.digest)


def test_a_repair_keeps_what_it_can_read_and_names_what_it_lost(tmp_path: Path) -> None:
    filled(tmp_path, 60)
    # The page in the middle of the largest table, found by its content.
    data = (tmp_path / "catalog.sqlite3").read_bytes()
    page = data.index(b"layers.0.q_proj", len(data) // 3) // 4096 * 4096
    damage(tmp_path, page)
    with pytest.raises(StoreCorrupt):
        LocalStore(tmp_path)
    report = repaired(tmp_path)
    assert 20 < len(report.kept) < 60
    assert len(report.kept) + len(report.lost) == 60
    # The page was one of the versions' table; an index of it still counts the rows.
    assert report.unread == {"versions": len(report.lost)}
    assert len(list((tmp_path / "lost").iterdir())) == report.files_set_aside > 0
    with LocalStore(tmp_path) as store:
        names = [record.id.name for record in store.list(TENANT, 1000).records]
        assert [f"{TENANT}/{name}" for name in names] == sorted(report.kept)
        for name in names:
            assert stored(store, store.get(TENANT, name).digest) == content(name)
        lost = report.lost[0].partition("/")[2]
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, lost)
        assert put(store, lost, content(lost)).created


def test_a_repair_counts_the_names_that_it_could_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, 400)
    data = (tmp_path / "catalog.sqlite3").read_bytes()
    # A leaf of the table of names: only there are labels.
    damage(tmp_path, data.index(b'{"n": "200"}') // 4096 * 4096)
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    kept = int(said.split(" adapters kept")[0])
    assert 200 < kept < 400
    assert f"could not be read: {400 - kept} rows of the catalog's table names\n" in said
    output = tmp_path / "out"
    assert f"python -m loramux_adapters.store.restore {tmp_path} OUTPUT_DIRECTORY" in said
    assert len(restore(tmp_path, output).adapters) == 400 - kept
    with LocalStore(tmp_path) as store:
        for directory in (output / TENANT).iterdir():
            name = directory.name.partition("@")[0]
            files = {file.name: file.read_bytes() for file in directory.iterdir()}
            assert files == content(name)
            assert put(store, name, files).created
        assert len(store.list(TENANT, 1000).records) == 400


def tree(root: Path) -> dict[Path, bytes]:
    """Everything but the lock, which names its last holder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("killed", [False, True])
def test_a_healthy_catalog_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], killed: bool) -> None:
    root = tmp_path / "a store #1?"
    filled(root)
    if killed:  # then its last changes are in the write-ahead log alone
        with LocalStore(root) as store:
            put(store, "last", content("last"))
            shutil.copytree(root, tmp_path / "copy")
        root = tmp_path / "copy"
        (root / "catalog.sqlite3-shm").unlink()
    before = tree(root)
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == "the catalog is healthy, and nothing was changed\n"
    assert {path: data for path, data in tree(root).items() if not path.name.endswith("-shm")} == before
    with LocalStore(root) as store:
        assert len(store.list(TENANT).records) == 3 + killed


def break_an_index(root: Path) -> None:
    """SQLite's quick check, which a start makes, does not see that."""
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite3", isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = replace(sql, '(version)', '(created)') WHERE name = ?",
                           ("names_by_version",))  # fmt: skip


def break_a_reference(root: Path) -> None:
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite3", isolation_level=None)) as connection:
        connection.execute("DELETE FROM versions WHERE id = 1")


def empty(root: Path) -> None:
    (root / "catalog.sqlite3").write_bytes(b"")


@pytest.mark.parametrize("break_", [break_an_index, break_a_reference, empty])
def test_what_a_quick_look_does_not_see_is_repaired(tmp_path: Path, break_: Callable[[Path], None]) -> None:
    filled(tmp_path)
    break_(tmp_path)
    assert repaired(tmp_path).damaged is not None
    assert repair(tmp_path) is None


def test_a_catalog_of_a_newer_program_is_not_repaired(tmp_path: Path) -> None:
    filled(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailable, match="format 99"):
        repair(tmp_path)


def test_a_rebuild_drops_adapters_whose_files_are_gone(tmp_path: Path) -> None:
    filled(tmp_path)
    next((tmp_path / "blobs").glob("*/*")).unlink()
    assert repair(tmp_path) is None
    assert len(repaired(tmp_path, rebuild=True).lost) == 1


def test_the_repair_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    with LocalStore(tmp_path):
        assert main([str(tmp_path)]) == REFUSED
        assert "in use by process" in capsys.readouterr().err
    assert main([str(tmp_path), "--rebuild"]) == 0
    said = capsys.readouterr().out
    assert "3 adapters kept, 0 lost" in said
    assert f"the catalog as it was is {tmp_path}/catalog.sqlite3.damaged-1\n" in said
    assert main([str(tmp_path / "nowhere")]) == REFUSED
    assert "there is no store" in capsys.readouterr().err

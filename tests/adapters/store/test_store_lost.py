"""A catalog that lost what it had acknowledged: the bytes stay, are named, and can be had back."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.errors import REFUSED, AdapterNotFound
from loramux_adapters.store.disk import Disk
from loramux_adapters.store.journal import FILE_NAME, Journal, Publication, read_journal
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.restore import main, restore
from support.stores import TENANT, SteppedDisk, blob_files, content, digest_of, put, stored

DAY = 86_400.0
OLD, NEW = content("old"), content("new")


def remove(log: Path) -> None:
    log.unlink()


def tear(log: Path) -> None:
    """The first page of the log is not what was written: SQLite believes nothing from there on."""
    data = bytearray(log.read_bytes())
    data[100] ^= 1
    log.write_bytes(data)


def lose_the_log(root: Path, harm: Callable[[Path], None]) -> None:
    """A store whose last publish is in the write-ahead log alone, as after a crash; then the log is harmed."""
    with LocalStore(root / "live") as store:
        put(store, "old", OLD)
    with LocalStore(root / "live") as store:
        put(store, "new", NEW, labels={"team": "docs"})
        shutil.copytree(root / "live", root / "store")
    harm(root / "store" / "catalog.sqlite3-wal")
    (root / "store" / "catalog.sqlite3-shm").unlink()


@pytest.mark.parametrize("harm", [remove, tear])
def test_a_lost_or_torn_log_costs_no_bytes_and_has_a_way_back(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
) -> None:
    lose_the_log(tmp_path, harm)
    root = tmp_path / "store"
    with caplog.at_level(logging.WARNING), LocalStore(root) as store:
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "new")
        assert stored(store, store.get(TENANT, "old").digest) == OLD
        assert len(blob_files(root)) == 2
        assert len(list((root / "lost").glob("*/*"))) == 2
        [line] = [record.getMessage() for record in caplog.records]
        assert line.startswith("2 stored files that the catalog does not know move to")
        assert f"python -m loramux_adapters.store.restore {root} OUTPUT_DIRECTORY" in line
        # Beside a running server, and after a start later:
        assert main([str(root), str(tmp_path / "out")]) == 0
    directory = tmp_path / "out" / TENANT / f"new@{digest_of(NEW)[:12]}"
    assert f"loramux adapters push {directory} new" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == NEW
    LocalStore(root).close()
    assert len(restore(root, tmp_path / "again").adapters) == 1
    with LocalStore(root) as store:
        put(store, "new", {path.name: path.read_bytes() for path in directory.iterdir()})
        assert stored(store, store.get(TENANT, "new").digest) == NEW


def test_lost_files_go_after_a_week_and_those_of_a_repair_stay(tmp_path: Path) -> None:
    lose_the_log(tmp_path, remove)
    root = tmp_path / "store"
    LocalStore(root, clock=lambda: 100 * DAY).close()
    (root / "lost" / ("a" * 64)).write_bytes(b"set aside by a repair")
    for days, left in ((100, 2), (107, 2), (108, 0)):
        LocalStore(root, clock=lambda days=days: days * DAY).close()
        assert len(list((root / "lost").glob("*/*"))) == left
    assert (root / "lost" / ("a" * 64)).exists()
    assert [entry.name for entry in read_journal(root, Disk())] == ["old"]


def test_files_that_cannot_be_moved_stay_and_keep_their_name(tmp_path: Path) -> None:
    lose_the_log(tmp_path, remove)
    root = tmp_path / "store"

    def step(operation: str, path: Path) -> None:
        if "lost" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    with LocalStore(root, disk=SteppedDisk(step)) as store:
        assert len(blob_files(root)) == 4
        assert store.get(TENANT, "old")
        assert {entry.name for entry in read_journal(root, Disk())} == {"new", "old"}
    LocalStore(root).close()
    assert len(blob_files(root)) == 2
    assert [name for _, name, _ in restore(root, tmp_path / "out").adapters] == ["new"]


def test_what_an_install_left_half_done_is_no_blob(tmp_path: Path) -> None:
    LocalStore(tmp_path).close()
    (tmp_path / "blobs" / "aa").mkdir()
    (tmp_path / "blobs" / "aa" / ("a" * 64 + ".tmp")).write_bytes(b"x")
    LocalStore(tmp_path).close()
    assert blob_files(tmp_path) == set()
    assert not (tmp_path / "lost").exists()


def test_the_journal_forgets_what_was_deleted_and_skips_a_torn_line(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        for name in ("a", "b", "c"):
            put(store, name, content(name))
        put(store, "a", content("a"))
        store.delete(TENANT, "b")
    with (tmp_path / FILE_NAME).open("ab") as stream:
        stream.write(b'\n{"tenant": "defa')
    with LocalStore(tmp_path) as store:
        put(store, "d", content("d"))
        names = [entry.name for entry in read_journal(tmp_path, Disk())]
    assert names == ["c", "a", "d"]
    for line in (tmp_path / FILE_NAME).read_bytes().splitlines():
        assert not line or json.loads(line)["files"]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    """A write that failed half-way leaves one, and the server publishes on."""
    (tmp_path / FILE_NAME).write_bytes(b'{"tenant": "defa')
    publication = Publication(TENANT, "a", digest_of(NEW), {"file": "0" * 64})
    Journal(tmp_path, Disk()).append(publication)
    assert read_journal(tmp_path, Disk()) == [publication]


def test_a_store_without_a_journal_gets_one(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        put(store, "one", OLD)
        put(store, "one", NEW)
    (tmp_path / FILE_NAME).unlink()
    LocalStore(tmp_path).close()
    assert [entry.digest for entry in read_journal(tmp_path, Disk())] == [digest_of(OLD), digest_of(NEW)]


def test_restoring_takes_no_damaged_bytes_and_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose_the_log(tmp_path, remove)
    root = tmp_path / "store"
    LocalStore(root).close()
    file = max((root / "lost").glob("*/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"rotten")
    assert main([str(root), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"0 adapters restored: {root / 'lost'} holds none whole\n")
    assert not (tmp_path / "out").exists()
    assert f"belongs to no known adapter: {file}" in said
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == REFUSED
    assert "there is no store" in capsys.readouterr().err


def test_a_file_that_is_set_aside_already_leaves_the_blobs(tmp_path: Path) -> None:
    """An upload set aside and then resumed has one file under both names: renaming one to the other does nothing."""
    with LocalStore(tmp_path) as store:
        put(store, "old", OLD)
    blob = next((tmp_path / "blobs").glob("*/*"))
    unknown = blob.with_name("0" * 64)
    unknown.write_bytes(b"unknown")
    with LocalStore(tmp_path):
        pass
    [aside] = (tmp_path / "lost").glob("*/*")
    os.link(aside, unknown)
    with LocalStore(tmp_path):
        assert not unknown.exists()
        assert aside.read_bytes() == b"unknown"
        assert len(blob_files(tmp_path)) == len(OLD)

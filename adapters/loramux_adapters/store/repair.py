"""Rebuild a damaged catalog from what can still be read: `python -m loramux_adapters.store.repair DIRECTORY`.

A healthy one is left alone. Never deletes: the damaged catalog is kept beside the new one, and bytes that no recovered
adapter needs move to `lost/`. A name whose current version is lost is dropped, not rolled back to an older one in
silence.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import REFUSED, AdapterError, StoreUnavailable
from loramux_adapters.store import lifetimes, schema
from loramux_adapters.store.disk import Disk, storage_errors
from loramux_adapters.store.lock import DirectoryLock

_BUSY_SECONDS = 1.0

# In this order, after all that could be read was copied. A name goes before the versions it kept are looked at.
_PRUNE = (
    "DELETE FROM version_files WHERE sha256 NOT IN (SELECT sha256 FROM blobs)",
    "DELETE FROM versions WHERE files <> (SELECT count(*) FROM version_files f WHERE f.version = versions.id)",
    "DELETE FROM version_files WHERE version NOT IN (SELECT id FROM versions)",
    "DELETE FROM names WHERE version NOT IN (SELECT id FROM versions)",
    """DELETE FROM history WHERE version NOT IN (SELECT id FROM versions)
        OR NOT EXISTS (SELECT 1 FROM names n WHERE n.tenant = history.tenant AND n.name = history.name)""",
    "INSERT OR IGNORE INTO history (tenant, name, version) SELECT tenant, name, version FROM names",
    """DELETE FROM aliases
        WHERE NOT EXISTS (SELECT 1 FROM names n WHERE n.tenant = aliases.tenant AND n.name = aliases.name)""",
    lifetimes.PRUNE,
    "DELETE FROM versions WHERE id NOT IN (SELECT version FROM history)",
    "DELETE FROM version_files WHERE version NOT IN (SELECT id FROM versions)",
    "DELETE FROM blobs WHERE sha256 NOT IN (SELECT sha256 FROM version_files)",
)


@dataclass(frozen=True)
class Report:
    """What a repair came to; names as "tenant/name". `damaged` is the old catalog, None if there was none.

    `unread` is how many rows of each table could not be read, None where that cannot be known; whole tables are left
    out. Names in such rows are in neither `kept` nor `lost`.
    """

    kept: tuple[str, ...]
    lost: tuple[str, ...]
    files_set_aside: int
    damaged: Path | None
    unread: Mapping[str, int | None]


def repair(root: Path, *, rebuild: bool = False) -> Report | None:
    """Rebuild the catalog of a store that no server uses; None: it is healthy, and nothing was changed.

    `rebuild` does it anyway: names whose files are gone are dropped then. Raises StoreUnavailable (in use, full, no
    store there, made by a newer version).
    """
    if not (root / "blobs").is_dir():
        raise StoreUnavailable("there is no store in that directory", subject="store", remedy="check the path")
    lock = DirectoryLock(root)
    try:
        with storage_errors("be repaired"), schema.catalog_errors(root):
            if not rebuild and _is_healthy(root / "catalog.sqlite3"):
                return None
            return _rebuild(root, Disk())
    finally:
        lock.release()


def _is_healthy(catalog: Path) -> bool:
    if not catalog.exists():
        return False
    # Else SQLite would fold its log into it when it is closed, or make a log where there is none.
    mode = "mode=ro" if catalog.with_name(f"{catalog.name}-wal").exists() else "immutable=1"
    with closing(sqlite3.connect(f"{catalog.absolute().as_uri()}?{mode}", uri=True, timeout=_BUSY_SECONDS)) as opened:
        return schema.is_healthy(opened)


def _rebuild(root: Path, disk: Disk) -> Report:
    catalog, fresh = root / "catalog.sqlite3", root / "catalog.sqlite3.new"
    _remove_database(fresh, disk)
    with closing(sqlite3.connect(fresh, isolation_level=None)) as target:
        schema.create_tables(target)
        lifetimes.create_table(target)
        target.execute("BEGIN IMMEDIATE")
        unread = _salvage(catalog, target) if catalog.exists() else {}
        present = {file.name for shard in disk.children(root / "blobs") for file in disk.children(shard)}
        target.executemany(
            "DELETE FROM blobs WHERE sha256 = ?",
            [row for row in target.execute("SELECT sha256 FROM blobs").fetchall() if row[0] not in present],
        )
        before = _names(target)
        for statement in _PRUNE:
            target.execute(statement)
        kept = _names(target)
        needed = {row[0] for row in target.execute("SELECT sha256 FROM blobs").fetchall()}
        target.execute("COMMIT")
    aside = _set_files_aside(root, needed, disk)
    disk.sync(fresh)
    damaged = _keep_damaged(catalog, disk)
    disk.rename(fresh, catalog)
    disk.sync(root)
    return Report(tuple(kept), tuple(name for name in before if name not in kept), aside, damaged, unread)


def _salvage(catalog: Path, target: sqlite3.Connection) -> dict[str, int | None]:
    """Copy every row that can be read, table by table; returns what `Report.unread` is.

    An older catalog's rows lack the last columns of today's.
    """
    unread: dict[str, int | None] = {}
    for table in (*schema.TABLES, lifetimes.TABLE):
        if table == lifetimes.TABLE and not _may_have(catalog, table):
            continue
        columns = [column[1] for column in target.execute(f"PRAGMA table_info({table})").fetchall()]
        rows = _ReadableRows(catalog, table)
        for row in rows:
            if len(row) <= len(columns):
                names, holes = ", ".join(columns[: len(row)]), ", ".join("?" * len(row))
                target.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({holes})", row)
        expected = _count_rows(catalog, table, target) if rows.interrupted else None
        copied = target.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
        if rows.interrupted and expected != copied:
            unread[table] = None if expected is None or expected < copied else expected - copied
    return unread


def _may_have(catalog: Path, table: str) -> bool:
    try:
        with closing(_open_damaged(catalog)) as source:
            return bool(source.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)).fetchall())
    except sqlite3.DatabaseError:
        return True


class _ReadableRows:
    """Rows from the front up to the first damaged page, then from the back; some may come twice.

    The table's own pages only: `NOT INDEXED` keeps a damaged index out of the way. `interrupted` afterwards: not every
    row was reached from the front.
    """

    def __init__(self, catalog: Path, table: str) -> None:
        self._catalog = catalog
        self._table = table
        self.interrupted = False

    def __iter__(self) -> Iterator[Sequence[object]]:
        for order in ("ASC", "DESC"):
            try:
                with closing(_open_damaged(self._catalog)) as source:
                    yield from source.execute(f"SELECT * FROM {self._table} NOT INDEXED ORDER BY 1 {order}")
                return
            except sqlite3.DatabaseError:
                self.interrupted = True


def _count_rows(catalog: Path, table: str, target: sqlite3.Connection) -> int | None:
    """How many rows a damaged table had, by an index of its own that can be read; None without one."""
    for index in [row[1] for row in target.execute(f"PRAGMA index_list({table})").fetchall()]:
        try:
            with closing(_open_damaged(catalog)) as source:
                # A partial index, or one that is the table itself, gives no plan here, which is an error too.
                return int(source.execute(f'SELECT count(*) FROM {table} INDEXED BY "{index}"').fetchall()[0][0])
        except sqlite3.DatabaseError:
            continue
    return None


def _open_damaged(catalog: Path) -> sqlite3.Connection:
    return sqlite3.connect(catalog, timeout=_BUSY_SECONDS, isolation_level=None)


def _names(connection: sqlite3.Connection) -> list[str]:
    return [f"{tenant}/{name}" for tenant, name in connection.execute("SELECT tenant, name FROM names ORDER BY 1, 2")]


def _keep_damaged(catalog: Path, disk: Disk) -> Path | None:
    """Give the damaged catalog a second name; its log moves away, lest SQLite replay it into the new one."""
    if not catalog.exists():
        return None
    number = 1
    while (damaged := catalog.with_name(f"{catalog.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm"):
        if (part := catalog.with_name(catalog.name + suffix)).exists():
            disk.rename(part, damaged.with_name(damaged.name + suffix))
    disk.link(catalog, damaged)
    return damaged


def _set_files_aside(root: Path, needed: set[str], disk: Disk) -> int:
    disk.make_directory(root / "lost")
    moved = 0
    for shard in disk.children(root / "blobs"):
        for file in disk.children(shard):
            if file.name not in needed:
                disk.rename(file, root / "lost" / file.name)
                moved += 1
    return moved


def _remove_database(path: Path, disk: Disk) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        disk.remove(path.with_name(path.name + suffix))


def main(arguments: Sequence[str] | None = None) -> int:
    """Repair the store named on the command line and say what came of it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loramux_adapters.store.repair", description=__doc__)
    parser.add_argument("directory", type=Path, help="the store's directory; no server may be using it")
    parser.add_argument(
        "--rebuild", action="store_true", help="rebuild a healthy catalog too: drops adapters whose files are gone"
    )
    options = parser.parse_args(arguments)
    root = options.directory
    try:
        report = repair(root, rebuild=options.rebuild)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    if report is None:
        print("the catalog is healthy, and nothing was changed")
        return 0
    print(
        f"{len(report.kept)} adapters kept, {len(report.lost)} lost, {report.files_set_aside} files in {root / 'lost'}"
    )
    for table, rows in report.unread.items():
        count = "an unknown number of" if rows is None else str(rows)
        print(f"could not be read: {count} rows of the catalog's table {table}")
    for name in report.lost:
        print(f"lost: {name} (push it again)")
    if report.files_set_aside:
        print(f"to get adapters back: python -m loramux_adapters.store.restore {root} OUTPUT_DIRECTORY")
    if report.damaged:
        print(f"the catalog as it was is {report.damaged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

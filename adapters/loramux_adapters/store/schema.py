"""The catalog's tables, how a connection to it is opened and checked, what SQLite's errors mean.

Knows no adapter semantics beyond the columns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.errors import AdapterError, StoreCorrupt, StoreFull, StoreUnavailable

SCHEMA_VERSION = 3
TABLES = ("blobs", "versions", "version_files", "names", "history", "aliases")  # parents first

# A version belongs to a tenant although its digest is global: two tenants may send different files of one
# digest (other metadata), and neither may be given the other's. Blobs are shared, being the same bytes.
_DDL = """
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
    -- Fingerprints of the bases it was published for, a comma between; empty: before these were remembered.
    bases TEXT NOT NULL DEFAULT '',
    -- JSON: fingerprint of a base -> what replaying the certificate on it came to.
    replays TEXT NOT NULL DEFAULT '{}',
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
    materialised INTEGER NOT NULL DEFAULT 0 CHECK (materialised IN (0, 1)),
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE INDEX names_by_version ON names (version);
CREATE INDEX names_with_wishes ON names (version) WHERE pinned OR materialised;
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
"""

# What makes a catalog of that version one of the next. A column is added at the end of its table, here and above: rows
# of an older catalog are then the first columns of a newer one, which is how `repair` reads them.
_UPGRADES = {
    1: """
ALTER TABLE versions ADD COLUMN bases TEXT NOT NULL DEFAULT '';
ALTER TABLE names ADD COLUMN materialised INTEGER NOT NULL DEFAULT 0 CHECK (materialised IN (0, 1));
CREATE INDEX names_with_wishes ON names (version) WHERE pinned OR materialised;
""",
    2: """
ALTER TABLE versions ADD COLUMN replays TEXT NOT NULL DEFAULT '{}';
""",
}

_UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# Its shared-memory file cannot grow: on a full disk that comes before SQLITE_FULL.
_FULL = {sqlite3.SQLITE_IOERR_SHMSIZE}
_REASONS = {
    sqlite3.SQLITE_BUSY: ("is locked by another process", "try again"),
    sqlite3.SQLITE_LOCKED: ("is locked by another process", "try again"),
    sqlite3.SQLITE_READONLY: ("is read-only", "make it writable and try again"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "look at the store's directory and its permissions"),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "look at the system's log and the free space"),
}


def repair_command(root: Path | None = None) -> str:
    """What an operator runs, with the server stopped; without a root a placeholder, fit for strangers."""
    return f"stop the server and run `python -m loramux_adapters.store.repair {root or 'STORE_DIRECTORY'}`"


@contextmanager
def catalog_errors(root: Path | None = None) -> Iterator[None]:
    """Turn SQLite's errors into StoreCorrupt or StoreUnavailable; a broken constraint stays what it is, a bug."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise _translated(error, root) from error


def _translated(error: sqlite3.Error, root: Path | None) -> AdapterError:
    extended = _extended(error)
    code = _primary(error)
    if code == sqlite3.SQLITE_FULL or extended in _FULL:
        remedy = "free some space (deleting adapters works) and try again"
        return StoreFull("the store's catalog has no space left on its disk", subject="store", remedy=remedy)
    if code in _UNREADABLE:
        return StoreCorrupt("the store's catalog is damaged", subject="store", remedy=repair_command(root))
    reason, remedy = _REASONS.get(code, ("cannot be used", "look at the server's log"))
    return StoreUnavailable(f"the store's catalog {reason}", subject="store", remedy=remedy)


def _extended(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR))


def _primary(error: sqlite3.Error) -> int:
    return _extended(error) & 0xFF


def connect(
    path: Path, busy_seconds: float, factory: type[sqlite3.Connection] = sqlite3.Connection
) -> sqlite3.Connection:
    """A connection in autocommit mode that waits up to `busy_seconds` for another process' lock.

    synchronous=FULL: the usual NORMAL of WAL mode loses acknowledged commits on power loss.
    """
    connection = sqlite3.connect(
        path, timeout=busy_seconds, isolation_level=None, check_same_thread=False, factory=factory
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(connection: sqlite3.Connection, root: Path, *, blobs_exist: bool) -> None:
    """Check an opened catalog, bring an older one to this version, or create its tables in a new one.

    Raises StoreCorrupt (damaged, or gone while blobs are there: sweeping then would destroy them all)
    and StoreUnavailable (made by a newer version).
    """
    with catalog_errors(root):
        found = connection.execute("PRAGMA quick_check(1)").fetchall()
        if found != [("ok",)]:
            raise StoreCorrupt("the store's catalog is damaged", subject="store", remedy=repair_command(root))
        version = connection.execute("PRAGMA user_version").fetchall()[0][0]
        _refuse_newer(version)
        if version == 0:
            if blobs_exist:
                raise StoreCorrupt(
                    "the store holds files but its catalog is empty", subject="store", remedy=repair_command(root)
                )
            create_tables(connection)
        elif version < SCHEMA_VERSION:
            _run(connection, "".join(_UPGRADES[number] for number in range(version, SCHEMA_VERSION)))


def is_healthy(connection: sqlite3.Connection) -> bool:
    """Whether a catalog of this version or an older one is whole: more than `prepare` checks, and slower.

    Raises StoreUnavailable for one of a newer version.
    """
    try:
        version = connection.execute("PRAGMA user_version").fetchall()[0][0]
        _refuse_newer(version)
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        whole = connection.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
        return whole and version > 0 and tables >= set(TABLES) and not _dangling(connection)
    except sqlite3.DatabaseError as error:
        if _primary(error) in _UNREADABLE:
            return False
        raise


def _dangling(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("PRAGMA foreign_key_check").fetchall())


def _refuse_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"the store's catalog has format {version}, this program knows {SCHEMA_VERSION}",
            subject="store",
            remedy="use the newer program that made it",
        )


def create_tables(connection: sqlite3.Connection) -> None:
    """Make the tables and stamp the version, all or nothing."""
    _run(connection, _DDL)


def _run(connection: sqlite3.Connection, statements: str) -> None:
    """All of them and the version's stamp in one transaction; one that fails is undone when the connection closes."""
    connection.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

"""Names that end by themselves: at a wall time, or with the last of their uses. A table beside the catalog's own.

The row goes with its name. It has an id of its own, never given twice: a use of what a name was before is no use of
what it is now. Functions over a connection, as `changes`; knows no request and no clock.
"""

from __future__ import annotations

import sqlite3

from loramux_adapters.errors import AdapterConflict
from loramux_adapters.store.records import UploadManifest

TABLE = "lifetimes"
_BATCH = 500  # names removed by one transaction: others wait for it

# Not in `schema`: a program that does not know of it may open the catalog, and then ends no name.
_DDL = """
CREATE TABLE IF NOT EXISTS lifetimes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    expires REAL,
    max_uses INTEGER CHECK (max_uses > 0),
    uses INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, name),
    FOREIGN KEY (tenant, name) REFERENCES names (tenant, name) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS lifetimes_by_expiry ON lifetimes (expires) WHERE expires IS NOT NULL;
"""

PRUNE = """DELETE FROM lifetimes
    WHERE NOT EXISTS (SELECT 1 FROM names n WHERE n.tenant = lifetimes.tenant AND n.name = lifetimes.name)"""
"""For a repair, which copies rows without looking at what they belong to."""


def create_table(connection: sqlite3.Connection) -> None:
    """Make the table where it is absent; without a write where it is there."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (TABLE,)).fetchall():
        connection.executescript(f"BEGIN IMMEDIATE; {_DDL} COMMIT;")


def put(tx: sqlite3.Connection, tenant: str, manifest: UploadManifest, *, is_new: bool, now: float) -> None:
    """Give a name that was just published the end its manifest says, counted from now, or none.

    Raises AdapterConflict where the name was there before (not `is_new`) and had no end.
    """
    key = (tenant, manifest.name)
    had_end = tx.execute("DELETE FROM lifetimes WHERE tenant = ? AND name = ?", key).rowcount > 0
    if not manifest.ends:
        return
    if not (is_new or had_end):
        raise without_end(manifest.name)
    expires = None if manifest.ttl_seconds is None else now + manifest.ttl_seconds
    tx.execute(
        "INSERT INTO lifetimes (tenant, name, expires, max_uses) VALUES (?, ?, ?, ?)",
        (*key, expires, manifest.max_uses),
    )


def without_end(name: str) -> AdapterConflict:
    """What an upload with an end gets for the name of an adapter that has none, whose versions it would take along."""
    remedy = f"choose another name for this upload, or delete {name!r} first"
    return AdapterConflict(f"adapter {name!r} has no end", subject=name, remedy=remedy)


def count_use(tx: sqlite3.Connection, lifetime: int) -> bool:
    """Count one use; with the last one the name goes, which is what is returned."""
    tx.execute("UPDATE lifetimes SET uses = uses + 1 WHERE id = ?", (lifetime,))
    ended = tx.execute("SELECT tenant, name FROM lifetimes WHERE id = ? AND uses >= max_uses", (lifetime,)).fetchall()
    tx.executemany("DELETE FROM names WHERE tenant = ? AND name = ?", ended)
    return bool(ended)


def remove_expired(tx: sqlite3.Connection, now: float) -> int:
    """Remove names whose time is over, the first `_BATCH` of them; returns how many."""
    ended = tx.execute(
        "SELECT tenant, name FROM lifetimes WHERE expires <= ? ORDER BY expires LIMIT ?", (now, _BATCH)
    ).fetchall()
    tx.executemany("DELETE FROM names WHERE tenant = ? AND name = ?", ended)
    return len(ended)

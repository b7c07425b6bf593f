"""What would have to be counted over a whole catalog, kept by triggers: no change costs more in a larger one.

Tables beside the catalog's own and derived from them: where they are absent they are filled. Loose is what may be
unreachable, for the next collection to look at.
"""

from __future__ import annotations

import sqlite3

_DDL = """
CREATE TABLE tenants (
    tenant TEXT NOT NULL PRIMARY KEY,
    names INTEGER NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
-- Files of kept versions: bytes that several versions share are counted once.
CREATE TABLE tenant_blobs (
    tenant TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    uses INTEGER NOT NULL,
    PRIMARY KEY (tenant, sha256)
) WITHOUT ROWID;
CREATE TABLE superseded (tenant TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (tenant, seq)) WITHOUT ROWID;
CREATE TABLE loose_versions (version INTEGER PRIMARY KEY);
CREATE TABLE loose_blobs (sha256 TEXT NOT NULL PRIMARY KEY) WITHOUT ROWID;
"""

_TRIGGERS = """
CREATE TRIGGER tally_name AFTER INSERT ON names BEGIN
    INSERT INTO tenants (tenant, names) VALUES (new.tenant, 1) ON CONFLICT (tenant) DO UPDATE SET names = names + 1;
END;
CREATE TRIGGER untally_name AFTER DELETE ON names BEGIN
    UPDATE tenants SET names = names - 1 WHERE tenant = old.tenant;
    DELETE FROM tenants WHERE tenant = old.tenant AND names = 0;
END;
CREATE TRIGGER supersede AFTER UPDATE OF version ON names WHEN old.version <> new.version BEGIN
    INSERT OR IGNORE INTO superseded SELECT tenant, seq FROM history
        WHERE tenant = old.tenant AND name = old.name AND version = old.version;
END;
CREATE TRIGGER tally_kept AFTER INSERT ON history BEGIN
    INSERT INTO tenant_blobs (tenant, sha256, size, uses)
        SELECT new.tenant, f.sha256, b.size, 1 FROM version_files f JOIN blobs b ON b.sha256 = f.sha256
        WHERE f.version = new.version
        ON CONFLICT (tenant, sha256) DO UPDATE SET uses = uses + 1;
END;
CREATE TRIGGER untally_kept AFTER DELETE ON history BEGIN
    UPDATE tenant_blobs SET uses = uses - 1
        WHERE tenant = old.tenant AND sha256 IN (SELECT sha256 FROM version_files WHERE version = old.version);
    DELETE FROM tenant_blobs WHERE uses = 0
        AND tenant = old.tenant AND sha256 IN (SELECT sha256 FROM version_files WHERE version = old.version);
    DELETE FROM superseded WHERE tenant = old.tenant AND seq = old.seq;
    INSERT OR IGNORE INTO loose_versions VALUES (old.version);
END;
CREATE TRIGGER tally_file AFTER INSERT ON version_files BEGIN
    INSERT INTO tenant_blobs (tenant, sha256, size, uses)
        SELECT h.tenant, new.sha256, b.size, 1 FROM history h JOIN blobs b ON b.sha256 = new.sha256
        WHERE h.version = new.version
        ON CONFLICT (tenant, sha256) DO UPDATE SET uses = uses + 1;
END;
CREATE TRIGGER untally_file AFTER DELETE ON version_files BEGIN
    UPDATE tenant_blobs SET uses = uses - (
            SELECT count(*) FROM history h WHERE h.version = old.version AND h.tenant = tenant_blobs.tenant
        )
        WHERE sha256 = old.sha256 AND tenant IN (SELECT tenant FROM history WHERE version = old.version);
    DELETE FROM tenant_blobs WHERE uses = 0
        AND sha256 = old.sha256 AND tenant IN (SELECT tenant FROM history WHERE version = old.version);
    INSERT OR IGNORE INTO loose_blobs VALUES (old.sha256);
END;
CREATE TRIGGER tally_bytes AFTER INSERT ON tenant_blobs BEGIN
    UPDATE tenants SET bytes = bytes + new.size WHERE tenant = new.tenant;
END;
CREATE TRIGGER untally_bytes AFTER DELETE ON tenant_blobs BEGIN
    UPDATE tenants SET bytes = bytes - old.size WHERE tenant = old.tenant;
END;
CREATE TRIGGER forget_version AFTER DELETE ON versions BEGIN
    DELETE FROM loose_versions WHERE version = old.id;
END;
"""

# With the triggers in place: bytes of `tenants` follow from the rows of `tenant_blobs`.
_FILL = """
INSERT INTO tenants (tenant, names) SELECT tenant, count(*) FROM names GROUP BY tenant;
INSERT INTO tenant_blobs (tenant, sha256, size, uses)
    SELECT h.tenant, f.sha256, b.size, count(*) FROM history h
    JOIN version_files f ON f.version = h.version JOIN blobs b ON b.sha256 = f.sha256 GROUP BY h.tenant, f.sha256;
INSERT INTO superseded SELECT h.tenant, h.seq FROM history h
    JOIN names n ON n.tenant = h.tenant AND n.name = h.name WHERE n.version <> h.version;
INSERT INTO loose_versions SELECT id FROM versions WHERE id NOT IN (SELECT version FROM history);
INSERT INTO loose_blobs SELECT sha256 FROM blobs WHERE sha256 NOT IN (SELECT sha256 FROM version_files);
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Make the tables and their triggers and fill them, where they are absent; without a write where they are there."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'tenants'").fetchall():
        connection.executescript(f"BEGIN IMMEDIATE; {_DDL} {_TRIGGERS} {_FILL} COMMIT;")


def count_names(tx: sqlite3.Connection, tenant: str) -> int:
    """How many names a tenant has."""
    rows = tx.execute("SELECT names FROM tenants WHERE tenant = ?", (tenant,)).fetchall()
    return int(rows[0][0]) if rows else 0


def count_bytes(tx: sqlite3.Connection, tenant: str) -> int:
    """Bytes of every distinct file that a tenant's names keep."""
    rows = tx.execute("SELECT bytes FROM tenants WHERE tenant = ?", (tenant,)).fetchall()
    return int(rows[0][0]) if rows else 0


def count_all(tx: sqlite3.Connection) -> tuple[int, int]:
    """Names, and bytes as `count_bytes` counts them, of all tenants."""
    names, size = tx.execute("SELECT coalesce(sum(names), 0), coalesce(sum(bytes), 0) FROM tenants").fetchall()[0]
    return int(names), int(size)


def oldest_superseded(tx: sqlite3.Connection, tenant: str) -> int | None:
    """The `seq` in `history` of the oldest version of a tenant that no name points at; None without any."""
    found = tx.execute("SELECT min(seq) FROM superseded WHERE tenant = ?", (tenant,)).fetchall()[0][0]
    return None if found is None else int(found)


def take_unreachable(tx: sqlite3.Connection) -> dict[int, str]:
    """Versions that no name keeps, row id -> digest: they stay loose until they are removed or kept again."""
    kept = "EXISTS (SELECT 1 FROM history h WHERE h.version = loose_versions.version)"
    tx.execute(f"DELETE FROM loose_versions WHERE {kept}")
    # CROSS: the planner thinks the loose ones many, having no statistics.
    rows = tx.execute(
        "SELECT v.id, v.digest FROM loose_versions l CROSS JOIN versions v ON v.id = l.version"
    ).fetchall()
    return dict(rows)


def take_unneeded(tx: sqlite3.Connection) -> list[str]:
    """Files that no version needs, which are not loose any more."""
    needed = "EXISTS (SELECT 1 FROM version_files f WHERE f.sha256 = loose_blobs.sha256)"
    blobs = [row[0] for row in tx.execute(f"SELECT sha256 FROM loose_blobs WHERE NOT {needed}").fetchall()]
    tx.execute("DELETE FROM loose_blobs")
    return blobs

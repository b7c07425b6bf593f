"""What the catalog's triggers keep, counted anew from the tables that it is of."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

_KEPT = """SELECT h.tenant, f.sha256, b.size, count(*) FROM history h
    JOIN version_files f ON f.version = h.version JOIN blobs b ON b.sha256 = f.sha256 GROUP BY h.tenant, f.sha256"""
_COUNTED = {
    "SELECT tenant, names, bytes FROM tenants": f"""SELECT n.tenant, count(*),
        (SELECT coalesce(sum(size), 0) FROM ({_KEPT}) k WHERE k.tenant = n.tenant) FROM names n GROUP BY n.tenant""",
    "SELECT tenant, sha256, size, uses FROM tenant_blobs": _KEPT,
    "SELECT tenant, seq FROM superseded": """SELECT h.tenant, h.seq FROM history h
        JOIN names n ON n.tenant = h.tenant AND n.name = h.name WHERE n.version <> h.version""",
}
_LOOSE = {
    "loose_versions": "SELECT id FROM versions WHERE id NOT IN (SELECT version FROM history)",
    "loose_blobs": "SELECT sha256 FROM blobs WHERE sha256 NOT IN (SELECT sha256 FROM version_files)",
}


def check_tallies(root: Path) -> None:
    """Every tally is what a count gives, and nothing unreachable is missing among the loose."""
    with closing(sqlite3.connect(root / "catalog.sqlite3")) as catalog:
        for kept, counted in _COUNTED.items():
            assert sorted(catalog.execute(kept)) == sorted(catalog.execute(counted)), kept
        for table, counted in _LOOSE.items():
            assert set(catalog.execute(f"SELECT * FROM {table}")) >= set(catalog.execute(counted)), table

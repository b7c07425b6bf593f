"""What a catalog transaction does: publish, update, delete, collect, quarantine.

Functions over a connection inside `Catalog.transaction`; an exception undoes all of it.
Knows no file on disk.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from loramux_adapters.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, QuotaExceeded
from loramux_adapters.names import MAX_ALIASES
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import lifetimes, tallies
from loramux_adapters.store.checks import check_labels
from loramux_adapters.store.nearby import suggest
from loramux_adapters.store.records import UNKNOWN_BASE, AdapterUpdate, FileEntry, Quotas, UploadManifest
from loramux_adapters.store.spec_json import encode_spec


def publish(
    tx: sqlite3.Connection,
    tenant: str,
    manifest: UploadManifest,
    spec: AdapterSpec,
    base: str,
    quotas: Quotas,
    now: float,
) -> tuple[bool, bool]:
    """Point a name at a version, making both as needed: (the name changed, its files must be installed).

    The count and the bytes are held against the quotas here, in the transaction: of two uploads that
    race for the last place exactly one gets it. Raises AdapterConflict, QuotaExceeded.
    """
    lifetimes.remove_expired(tx, now)
    name = manifest.name
    if tx.execute("SELECT 1 FROM aliases WHERE tenant = ? AND alias = ?", (tenant, name)).fetchall():
        raise AdapterConflict(f"{name!r} is an alias", subject=name, remedy="choose another name or remove the alias")
    version, is_new, install = _put_version(tx, tenant, spec, base, manifest.files)
    changed = _point(tx, tenant, manifest, version, quotas, now)
    tx.execute("DELETE FROM history WHERE tenant = ? AND name = ? AND version = ?", (tenant, name, version))
    tx.execute("INSERT INTO history (tenant, name, version) VALUES (?, ?, ?)", (tenant, name, version))
    tx.execute(
        """DELETE FROM history WHERE tenant = ?1 AND name = ?2 AND seq NOT IN
        (SELECT seq FROM history WHERE tenant = ?1 AND name = ?2 ORDER BY seq DESC LIMIT ?3)""",
        (tenant, name, max(1, quotas.keep_versions)),
    )
    if is_new:
        _make_room(tx, tenant, quotas)
    return changed, install


def _put_version(
    tx: sqlite3.Connection, tenant: str, spec: AdapterSpec, base: str, files: Sequence[FileEntry]
) -> tuple[int, bool, bool]:
    """The version's row id, whether no name kept it before, whether its files are to be installed."""
    wanted = {(entry.file, entry.sha256) for entry in files}
    rows = tx.execute(
        "SELECT id, bases FROM versions WHERE digest = ? AND tenant = ?", (spec.digest, tenant)
    ).fetchall()
    is_new = True
    if rows:
        version, known = rows[0]
        bases = ",".join(sorted({*known.split(","), base} - {UNKNOWN_BASE}))
        tx.execute("UPDATE versions SET bases = ? WHERE id = ?", (bases, version))
        is_new = not tx.execute("SELECT 1 FROM history WHERE version = ? LIMIT 1", (version,)).fetchall()
        stored = tx.execute(
            """SELECT f.file, f.sha256, b.corrupt FROM version_files f JOIN blobs b ON b.sha256 = f.sha256
            WHERE f.version = ?""",
            (version,),
        ).fetchall()
        if {(file, sha256) for file, sha256, _ in stored} != wanted and not any(row[2] for row in stored):
            return version, is_new, False  # other files of the same content: the first bytes stay
        tx.execute("UPDATE versions SET spec = ?, files = ? WHERE id = ?", (encode_spec(spec), len(files), version))
        tx.execute("DELETE FROM version_files WHERE version = ?", (version,))
    else:
        version = tx.execute(
            "INSERT INTO versions (tenant, digest, spec, files, bases) VALUES (?, ?, ?, ?, ?)",
            (tenant, spec.digest, encode_spec(spec), len(files), base),
        ).lastrowid
    for entry in files:
        tx.execute(
            """INSERT INTO blobs (sha256, size) VALUES (?, ?)
            ON CONFLICT (sha256) DO UPDATE SET corrupt = 0, size = excluded.size""",
            (entry.sha256, entry.size),
        )
        tx.execute(
            "INSERT INTO version_files (version, file, sha256) VALUES (?, ?, ?)", (version, entry.file, entry.sha256)
        )
    return version, is_new, True


def _point(
    tx: sqlite3.Connection, tenant: str, manifest: UploadManifest, version: int, quotas: Quotas, now: float
) -> bool:
    """Switch the name, or create it under the count quota; whether it now points elsewhere than before."""
    key = (tenant, manifest.name)
    rows = tx.execute("SELECT version FROM names WHERE tenant = ? AND name = ?", key).fetchall()
    if rows:
        changed = bool(rows[0][0] != version)
        if changed:
            tx.execute("UPDATE names SET version = ?, updated = ? WHERE tenant = ? AND name = ?", (version, now, *key))
    else:
        changed = True
        check_count(tallies.count_names(tx, tenant), quotas)
        tx.execute(
            "INSERT INTO names (tenant, name, version, created, updated) VALUES (?, ?, ?, ?, ?)",
            (*key, version, now, now),
        )
    lifetimes.put(tx, tenant, manifest, is_new=not rows, now=now)
    if manifest.labels:
        _write_labels(tx, tenant, manifest.name, manifest.labels)
    return changed


def check_count(count: int, quotas: Quotas) -> None:
    """QuotaExceeded when a tenant with `count` names may not have another."""
    if count >= quotas.max_adapters:
        raise QuotaExceeded(
            f"all {quotas.max_adapters} adapters allowed are there", subject="adapters", remedy="delete one first"
        )


def _make_room(tx: sqlite3.Connection, tenant: str, quotas: Quotas) -> None:
    """Bring a tenant's kept bytes under the quota: superseded versions go, oldest first; else QuotaExceeded."""
    while (used := tallies.count_bytes(tx, tenant)) > quotas.max_bytes:
        superseded = tallies.oldest_superseded(tx, tenant)
        if superseded is None:
            raise QuotaExceeded(
                f"{used} bytes of adapters would be more than the {quotas.max_bytes} allowed",
                subject="bytes",
                remedy="delete an adapter first",
            )
        tx.execute("DELETE FROM history WHERE seq = ?", (superseded,))


def update(tx: sqlite3.Connection, tenant: str, name: str, change: AdapterUpdate, now: float) -> None:
    """Apply `change` to a name. Raises AdapterNotFound, AdapterConflict, AdapterInvalid."""
    rows = tx.execute("SELECT labels FROM names WHERE tenant = ? AND name = ?", (tenant, name)).fetchall()
    if not rows:
        raise _absent(tx, tenant, name)
    for alias in change.remove_aliases:
        tx.execute("DELETE FROM aliases WHERE tenant = ? AND alias = ? AND name = ?", (tenant, alias, name))
    for alias in change.add_aliases:
        if tx.execute("SELECT 1 FROM names WHERE tenant = ? AND name = ?", (tenant, alias)).fetchall():
            raise AdapterConflict(f"{alias!r} is the name of an adapter", subject=alias, remedy="choose another alias")
        # Taking an alias from another adapter is the atomic switch aliases are for: no moment without it.
        tx.execute(
            """INSERT INTO aliases (tenant, alias, name) VALUES (?, ?, ?)
            ON CONFLICT (tenant, alias) DO UPDATE SET name = excluded.name""",
            (tenant, alias, name),
        )
    count = tx.execute("SELECT count(*) FROM aliases WHERE tenant = ? AND name = ?", (tenant, name)).fetchall()[0][0]
    if count > MAX_ALIASES:
        raise AdapterInvalid(f"{count} aliases are more than {MAX_ALIASES}", subject="aliases")
    labels = {key: value for key, value in json.loads(rows[0][0]).items() if key not in change.remove_labels}
    labels |= change.set_labels
    check_labels(labels)
    _write_labels(tx, tenant, name, labels)
    tx.execute(
        """UPDATE names SET pinned = coalesce(?, pinned), materialised = coalesce(?, materialised), updated = ?
        WHERE tenant = ? AND name = ?""",
        (change.pinned, change.merge, now, tenant, name),
    )


def delete(tx: sqlite3.Connection, tenant: str, name: str) -> None:
    """Remove a name, its aliases and history. AdapterNotFound."""
    if tx.execute("DELETE FROM names WHERE tenant = ? AND name = ?", (tenant, name)).rowcount == 0:
        raise _absent(tx, tenant, name)


def remove_versions(tx: sqlite3.Connection, versions: Iterable[int]) -> list[str]:
    """Remove version rows; returns the blobs that nothing needs any more, their rows removed too."""
    tx.executemany("DELETE FROM versions WHERE id = ?", [(version,) for version in versions])
    blobs = tallies.take_unneeded(tx)
    tx.executemany("DELETE FROM blobs WHERE sha256 = ?", [(sha256,) for sha256 in blobs])
    return blobs


def missing(tx: sqlite3.Connection, digests: Iterable[str]) -> frozenset[str]:
    """Those of `digests` that no tenant has a version of."""
    return frozenset(
        digest
        for digest in digests
        if not tx.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchall()
    )


def quarantine(tx: sqlite3.Connection, sha256: str) -> None:
    """Mark a blob as corrupt: every version that needs it is refused from now on."""
    tx.execute("UPDATE blobs SET corrupt = 1 WHERE sha256 = ?", (sha256,))


def _write_labels(tx: sqlite3.Connection, tenant: str, name: str, labels: Mapping[str, str]) -> None:
    text = json.dumps(dict(labels), sort_keys=True)
    tx.execute("UPDATE names SET labels = ? WHERE tenant = ? AND name = ?", (text, tenant, name))


def _absent(tx: sqlite3.Connection, tenant: str, name: str) -> AdapterNotFound:
    rows = tx.execute("SELECT name FROM aliases WHERE tenant = ? AND alias = ?", (tenant, name)).fetchall()
    if rows:
        remedy = f"{name!r} is an alias of {rows[0][0]!r}: use the name"
    else:
        remedy = suggest(lambda sql, values: tx.execute(sql, values).fetchall(), tenant, name, aliases=False)
    return AdapterNotFound(f"no adapter named {name!r}", subject=name, remedy=remedy)

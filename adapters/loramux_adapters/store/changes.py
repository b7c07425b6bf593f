"""What a catalog transaction does: publish, update, delete, collect, quarantine.

Functions over a connection inside `Catalog.transaction`; an exception undoes all of it.
Knows no file on disk.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.errors import AdapterConflict, AdapterCorrupt, AdapterInvalid, AdapterNotFound, QuotaExceeded
from loramux_adapters.names import MAX_ALIASES
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import lifetimes, tallies
from loramux_adapters.store.checks import check_labels
from loramux_adapters.store.nearby import suggest
from loramux_adapters.store.records import (
    UNKNOWN_BASE,
    AdapterUpdate,
    FileEntry,
    Quotas,
    ReplayRecord,
    UploadManifest,
)
from loramux_adapters.store.spec_json import encode_spec

CORRUPT = """EXISTS (
    SELECT 1 FROM version_files f JOIN blobs b ON b.sha256 = f.sha256 WHERE f.version = v.id AND b.corrupt
)"""
"""Of the version `v`: whether a file of it is damaged."""


def publish(
    tx: sqlite3.Connection,
    tenant: str,
    manifest: UploadManifest,
    spec: AdapterSpec,
    base: str,
    quotas: Quotas,
    now: float,
    replay: ReplayRecord | None = None,
) -> tuple[bool, Sequence[FileEntry]]:
    """Point a name at a version, making both as needed: (the name changed, the files that must be installed).

    The count and the bytes are held against the quotas here, in the transaction: of two uploads that
    race for the last place exactly one gets it. Raises AdapterConflict, QuotaExceeded.
    """
    lifetimes.remove_expired(tx, now)
    name = manifest.name
    if tx.execute("SELECT 1 FROM aliases WHERE tenant = ? AND alias = ?", (tenant, name)).fetchall():
        raise AdapterConflict(f"{name!r} is an alias", subject=name, remedy="choose another name or remove the alias")
    current = _current(tx, tenant, name)
    if manifest.if_version is not None and current != spec.digest:  # else it is published already, as by a lost call
        _expect(name, current, manifest.if_version)
    version, grows, install = _put_version(tx, tenant, spec, base, manifest.files)
    if replay is not None:
        tx.execute(
            "UPDATE versions SET replays = json_set(replays, '$.' || ?, json(?)) WHERE id = ?",
            (base, json.dumps(dataclasses.asdict(replay)), version),
        )
    changed = _point(tx, tenant, manifest, version, quotas, now)
    _remember(tx, tenant, name, version, quotas)
    if grows:
        _make_room(tx, tenant, quotas)
    return changed, install


def _remember(tx: sqlite3.Connection, tenant: str, name: str, version: int, quotas: Quotas) -> None:
    """The version is the newest of its name; what is too many of the oldest goes."""
    tx.execute("DELETE FROM history WHERE tenant = ? AND name = ? AND version = ?", (tenant, name, version))
    tx.execute("INSERT INTO history (tenant, name, version) VALUES (?, ?, ?)", (tenant, name, version))
    tx.execute(
        """DELETE FROM history WHERE tenant = ?1 AND name = ?2 AND seq NOT IN
        (SELECT seq FROM history WHERE tenant = ?1 AND name = ?2 ORDER BY seq DESC LIMIT ?3)""",
        (tenant, name, max(1, quotas.keep_versions)),
    )


def switch(tx: sqlite3.Connection, tenant: str, name: str, change: AdapterUpdate, quotas: Quotas, now: float) -> None:
    """Point a name at `change.version`, which one of the tenant's names keeps, if it points at `change.if_version` now.

    Either may be empty. Raises AdapterNotFound, AdapterConflict, AdapterInvalid (ambiguous), AdapterCorrupt.
    """
    current = _current(tx, tenant, name)
    if current is None:
        raise _absent(tx, tenant, name)
    if change.if_version:
        _expect(name, current, change.if_version)
    if not change.version:
        return
    version = _find_kept(tx, tenant, change.version)
    tx.execute("UPDATE names SET version = ?, updated = ? WHERE tenant = ? AND name = ?", (version, now, tenant, name))
    _remember(tx, tenant, name, version, quotas)


def _current(tx: sqlite3.Connection, tenant: str, name: str) -> str | None:
    """The digest that a name points at, None where there is no such name."""
    rows = tx.execute(
        "SELECT v.digest FROM names n JOIN versions v ON v.id = n.version WHERE n.tenant = ? AND n.name = ?",
        (tenant, name),
    ).fetchall()
    return str(rows[0][0]) if rows else None


def _expect(name: str, current: str | None, wanted: str) -> None:
    """Raises AdapterConflict unless a name points at the version that starts with `wanted`; empty: at none."""
    holds = (current or "").startswith(wanted) if wanted else current is None
    if holds:
        return
    found = f"points at {current[:12]}" if current is not None else "does not exist"
    raise AdapterConflict(
        f"{name!r} {found}, not at {wanted[:12]}" if wanted else f"{name!r} {found}, and was to be new",
        subject=name,
        remedy="look at what was published meanwhile, and decide anew",
    )


def _find_kept(tx: sqlite3.Connection, tenant: str, prefix: str) -> int:
    found = tx.execute(
        f"""SELECT DISTINCT v.id, v.digest, {CORRUPT} FROM versions v JOIN history h ON h.version = v.id
        WHERE h.tenant = ? AND substr(v.digest, 1, ?) = ?""",
        (tenant, len(prefix), prefix),
    ).fetchall()
    if not found:
        raise AdapterNotFound(
            f"no name keeps a version that starts with {prefix}", subject="version", remedy="push it again"
        )
    if len(found) > 1:
        raise AdapterInvalid(f"{len(found)} versions start with {prefix}", subject="version", remedy="give more digits")
    version, digest, corrupt = found[0]
    if corrupt:
        raise AdapterCorrupt(
            f"stored bytes of {digest[:12]} are damaged", subject=digest, remedy="upload the same content again"
        )
    return int(version)


def _put_version(
    tx: sqlite3.Connection, tenant: str, spec: AdapterSpec, base: str, files: Sequence[FileEntry]
) -> tuple[int, bool, Sequence[FileEntry]]:
    """The version's row id, whether kept bytes grow by it, which of its files are to be installed."""
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
        known_files = {file for file, _, _ in stored}
        if {(file, sha256) for file, sha256, _ in stored} != wanted and not any(row[2] for row in stored):
            # Other files of the same content: the first bytes stay.
            added = [entry for entry in files if entry.file == CERTIFICATE_FILE and entry.file not in known_files]
            tx.execute("UPDATE versions SET files = ? WHERE id = ?", (len(stored) + len(added), version))
            _put_files(tx, version, added)
            return version, is_new or bool(added), added
        tx.execute("UPDATE versions SET spec = ?, files = ? WHERE id = ?", (encode_spec(spec), len(files), version))
        tx.execute("DELETE FROM version_files WHERE version = ?", (version,))
    else:
        version = tx.execute(
            "INSERT INTO versions (tenant, digest, spec, files, bases) VALUES (?, ?, ?, ?, ?)",
            (tenant, spec.digest, encode_spec(spec), len(files), base),
        ).lastrowid
    _put_files(tx, version, files)
    return version, is_new, files


def _put_files(tx: sqlite3.Connection, version: int | None, files: Iterable[FileEntry]) -> None:
    for entry in files:
        tx.execute(
            """INSERT INTO blobs (sha256, size) VALUES (?, ?)
            ON CONFLICT (sha256) DO UPDATE SET corrupt = 0, size = excluded.size""",
            (entry.sha256, entry.size),
        )
        tx.execute(
            "INSERT INTO version_files (version, file, sha256) VALUES (?, ?, ?)", (version, entry.file, entry.sha256)
        )


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

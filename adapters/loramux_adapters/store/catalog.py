"""Names, versions and the files they need, in SQLite: connections, reads and the one transaction.

Knows no blob on disk and no hold; what a transaction does is in `changes`.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from loramux_adapters.errors import AdapterInvalid, AdapterNotFound
from loramux_adapters.spec import AdapterId, AdapterSpec
from loramux_adapters.store import lifetimes, schema, tallies
from loramux_adapters.store.changes import CORRUPT
from loramux_adapters.store.journal import Publication
from loramux_adapters.store.nearby import suggest
from loramux_adapters.store.records import (
    AdapterNames,
    AdapterRecord,
    DesiredState,
    FileEntry,
    Health,
    Lifetime,
    ReplayRecord,
)
from loramux_adapters.store.spec_json import decode_spec

Connect = Callable[[Path, float], sqlite3.Connection]
Row = tuple[Any, ...]

_WRITER_BUSY_SECONDS = 5.0
# Readers never wait for a writer in WAL mode, only for another process that holds the whole file.
_READER_BUSY_SECONDS = 0.1
_SPEC_CACHE = 4096

_CANONICAL = "coalesce((SELECT name FROM aliases WHERE tenant = :tenant AND alias = :name), :name)"
_LIFETIME = "LEFT JOIN lifetimes l ON l.tenant = n.tenant AND l.name = n.name"
_ALIVE = "(l.expires IS NULL OR l.expires > :now)"  # whether or not it was removed yet
_CURRENT = f"""FROM names n JOIN versions v ON v.id = n.version {_LIFETIME}
    WHERE n.tenant = :tenant AND n.name = {_CANONICAL} AND {_ALIVE}"""
_KEPT = f"""FROM names n JOIN history h ON h.tenant = n.tenant AND h.name = n.name JOIN versions v ON v.id = h.version
    {_LIFETIME} WHERE n.tenant = :tenant AND n.name = {_CANONICAL} AND {_ALIVE}
    AND substr(v.digest, 1, length(:prefix)) = :prefix"""
_RECORD = f"""n.name, v.digest, v.spec, {CORRUPT}, n.labels, n.pinned, n.materialised, n.created, n.updated,
    (SELECT group_concat(alias, ',') FROM aliases a WHERE a.tenant = n.tenant AND a.name = n.name),
    (SELECT group_concat(bases, ',') FROM versions w WHERE w.digest = v.digest), v.replays,
    (SELECT group_concat(digest, ',') FROM (SELECT w.digest FROM history h JOIN versions w ON w.id = h.version
        WHERE h.tenant = n.tenant AND h.name = n.name ORDER BY h.seq DESC)), l.id, l.expires, l.max_uses,
    l.uses"""


@dataclass(frozen=True)
class Found:
    """What a reference means: `lifetime` is the id of the name's, `max_uses` its limit, `uses_left` as counted."""

    name: str
    spec: AdapterSpec
    health: Health
    lifetime: int | None
    max_uses: int | None
    uses_left: int


class Catalog:
    """The database. Every method may raise StoreUnavailable or StoreCorrupt.

    Two connections, a lock each: server threads come and go, so a connection per thread would leak
    descriptors; and a reader of its own is never behind a writer's wait for the disk.
    """

    def __init__(
        self,
        root: Path,
        *,
        blobs_exist: bool,
        connect: Connect = schema.connect,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        path = root / "catalog.sqlite3"
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with schema.catalog_errors(root):
            self._writer = connect(path, _WRITER_BUSY_SECONDS)
            try:
                schema.prepare(self._writer, root, blobs_exist=blobs_exist)
                lifetimes.create_table(self._writer)
                tallies.create_tables(self._writer)
                self._reader = connect(path, _READER_BUSY_SECONDS)
                self._reader.execute("PRAGMA query_only = ON")
            except BaseException:
                self._writer.close()
                raise
        self._spec: Callable[[str], AdapterSpec] = lru_cache(maxsize=_SPEC_CACHE)(decode_spec)

    def close(self) -> None:
        """Close both connections; the last one folds the log into the database."""
        with self._read_lock:
            self._reader.close()
        with self._write_lock, schema.catalog_errors():
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one durable change: committed at its end, undone if it raises."""
        with self._write_lock, schema.catalog_errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite undoes some failed transactions by itself.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def find(self, tenant: str, name: str, prefix: str = "") -> Found:
        """What a name or alias means; its kept version with `prefix` if given.

        Raises AdapterNotFound, AdapterInvalid (ambiguous prefix).
        """
        columns = f"v.digest, n.name, v.spec, {CORRUPT}, l.id, l.max_uses, coalesce(l.max_uses - l.uses, 0)"
        _, found, spec, corrupt, *lifetime = self._one(columns, tenant, name, prefix, self._clock())
        return Found(found, self._spec(spec), _health(corrupt), *lifetime)

    def get(self, tenant: str, name: str, prefix: str = "", *, published: float | None = None) -> AdapterRecord:
        """As `find`, the whole record; as of the time `published` if that is given."""
        now = self._clock() if published is None else published
        row = self._one(f"v.digest, {_RECORD}", tenant, name, prefix, now)
        return self._record(tenant, row[1:])

    def page(self, tenant: str, after: str, limit: int) -> tuple[AdapterRecord, ...]:
        """Up to `limit` records with names above `after`, ascending."""
        rows = self._read(
            f"""SELECT {_RECORD} FROM names n JOIN versions v ON v.id = n.version {_LIFETIME}
            WHERE n.tenant = :tenant AND n.name > :after AND {_ALIVE} ORDER BY n.name LIMIT :limit""",
            {"tenant": tenant, "after": after, "limit": limit, "now": self._clock()},
        )
        return tuple(self._record(tenant, row) for row in rows)

    def count(self, tenant: str) -> int:
        """How many names a tenant has."""
        with self._read_lock, schema.catalog_errors():
            return tallies.count_names(self._reader, tenant)

    def usage(self) -> tuple[int, int]:
        """Names and bytes of all tenants."""
        with self._read_lock, schema.catalog_errors():
            return tallies.count_all(self._reader)

    def has_name(self, tenant: str, name: str) -> bool:
        """Whether `name` is a name, not an alias."""
        return bool(self._read("SELECT 1 FROM names WHERE tenant = ? AND name = ?", (tenant, name)))

    def has_alias(self, tenant: str, alias: str) -> bool:
        """Whether `alias` is an alias, not a name."""
        return bool(self._read("SELECT 1 FROM aliases WHERE tenant = ? AND alias = ?", (tenant, alias)))

    def has_end(self, tenant: str, name: str) -> bool:
        """Whether a name ends by itself."""
        return bool(self._read("SELECT 1 FROM lifetimes WHERE tenant = ? AND name = ?", (tenant, name)))

    def next_expiry(self) -> float | None:
        """When the next name's time is over; it may be past. None without any."""
        found = self._read("SELECT min(expires) FROM lifetimes WHERE expires IS NOT NULL")[0][0]
        return None if found is None else float(found)

    def is_reachable(self, digest: str) -> bool:
        """Whether any name of any tenant keeps a version of this digest."""
        return bool(
            self._read(
                "SELECT 1 FROM versions v JOIN history h ON h.version = v.id WHERE v.digest = ? LIMIT 1", (digest,)
            )
        )

    def desired_state(self) -> DesiredState:
        """The desired state of names, for the digests they point at."""
        rows = self._read(
            """SELECT v.digest, n.pinned, n.materialised FROM names n JOIN versions v ON v.id = n.version
            WHERE n.pinned OR n.materialised"""
        )
        return DesiredState(
            pinned=frozenset(digest for digest, pinned, _ in rows if pinned),
            merged=frozenset(digest for digest, _, merge in rows if merge),
        )

    def names(self, digests: Collection[str]) -> Mapping[str, AdapterNames]:
        """The names and aliases that point at each of `digests` now; those that have none are left out."""
        rows = self._read(
            f"""SELECT v.digest, n.name, (SELECT group_concat(a.alias, ',') FROM aliases a
            WHERE a.tenant = n.tenant AND a.name = n.name)
            FROM names n JOIN versions v ON v.id = n.version WHERE v.digest IN ({",".join("?" * len(digests))})""",
            tuple(digests),
        )
        found: dict[str, tuple[set[str], set[str]]] = {}
        for digest, name, aliases in rows:
            names, others = found.setdefault(digest, (set(), set()))
            names.add(name)
            others.update((aliases or "").split(",") if aliases else ())
        return {digest: AdapterNames(tuple(sorted(n)), tuple(sorted(a))) for digest, (n, a) in found.items()}

    def existing(self, digests: Collection[str]) -> frozenset[str]:
        """Those of `digests` of which any tenant has a version."""
        holes = ",".join("?" * len(digests))
        return frozenset(
            row[0] for row in self._read(f"SELECT digest FROM versions WHERE digest IN ({holes})", tuple(digests))
        )

    def bases(self, digest: str) -> frozenset[str]:
        """The bases of each tenant's version of a digest."""
        rows = self._read("SELECT bases FROM versions WHERE digest = ?", (digest,))
        return frozenset(base for row in rows for base in row[0].split(","))

    def blobs(self) -> Set[str]:
        """The hash of every file that some version needs."""
        return {row[0] for row in self._read("SELECT sha256 FROM blobs")}

    def has_blob(self, sha256: str) -> bool:
        """Whether some version needs this file."""
        return bool(self._read("SELECT 1 FROM blobs WHERE sha256 = ?", (sha256,)))

    def publications(self) -> list[Publication]:
        """Every version that a name without an end keeps, the oldest first."""
        rows = self._read(
            """SELECT h.seq, h.tenant, h.name, v.digest, f.file, f.sha256 FROM history h
            JOIN versions v ON v.id = h.version JOIN version_files f ON f.version = v.id
            WHERE NOT EXISTS (SELECT 1 FROM lifetimes l WHERE l.tenant = h.tenant AND l.name = h.name)
            ORDER BY h.seq, f.file"""
        )
        found: dict[int, Publication] = {}
        files: dict[int, dict[str, str]] = {}
        for seq, tenant, name, digest, file, sha256 in rows:
            files.setdefault(seq, {})[file] = sha256
            found[seq] = Publication(tenant, name, digest, files[seq])
        return list(found.values())

    def entries(self, tenant: str, digest: str) -> tuple[FileEntry, ...]:
        """The files of a tenant's version, by name; empty if there is no such version."""
        rows = self._read(
            """SELECT f.file, b.size, b.sha256 FROM versions v JOIN version_files f ON f.version = v.id
            JOIN blobs b ON b.sha256 = f.sha256 WHERE v.digest = ? AND v.tenant = ? ORDER BY f.file""",
            (digest, tenant),
        )
        return tuple(FileEntry(*row) for row in rows)

    def find_file(self, digest: str, file: str) -> FileEntry | None:
        """A file of a digest's first version that has one."""
        rows = self._read(
            """SELECT f.file, b.size, b.sha256 FROM versions v JOIN version_files f ON f.version = v.id
            JOIN blobs b ON b.sha256 = f.sha256 WHERE v.digest = ? AND f.file = ? ORDER BY v.id LIMIT 1""",
            (digest, file),
        )
        return FileEntry(*rows[0]) if rows else None

    def specs(self, digest: str) -> tuple[AdapterSpec, ...]:
        """The spec of each tenant's version of a digest: alike but for the consent to another base."""
        rows = self._read("SELECT spec FROM versions WHERE digest = ? ORDER BY id", (digest,))
        return tuple(self._spec(row[0]) for row in rows)

    def copies(self, digest: str) -> tuple[tuple[Health, Mapping[str, str]], ...]:
        """Each tenant's files of a digest, file -> sha256, and whether any of them is quarantined."""
        rows = self._read(
            f"""SELECT v.id, {CORRUPT}, f.file, f.sha256 FROM versions v JOIN version_files f ON f.version = v.id
            WHERE v.digest = ? ORDER BY v.id""",
            (digest,),
        )
        found: dict[int, tuple[Health, dict[str, str]]] = {}
        for version, corrupt, file, sha256 in rows:
            found.setdefault(version, (_health(corrupt), {}))[1][file] = sha256
        return tuple(found.values())

    def _one(self, columns: str, tenant: str, name: str, prefix: str, now: float) -> Row:
        """The only row for a reference; `columns` starts with the digest."""
        values = {"tenant": tenant, "name": name, "prefix": prefix, "now": now}
        rows = self._read(f"SELECT {columns} {_KEPT if prefix else _CURRENT}", values)
        if not rows:
            raise self._absent(values)
        if len(rows) > 1:
            raise AdapterInvalid(
                f"{len(rows)} versions of {name!r} start with {prefix}", subject="version", remedy="give more digits"
            )
        return rows[0]

    def _absent(self, values: Mapping[str, Any]) -> AdapterNotFound:
        tenant, name, prefix = values["tenant"], values["name"], values["prefix"]
        reference = f"{name}@{prefix}" if prefix else name
        ended = f"SELECT 1 FROM lifetimes WHERE tenant = :tenant AND name = {_CANONICAL} AND expires <= :now"
        if self._read(ended, values):
            remedy = "its time is over; upload it again"
        elif prefix and (self.has_name(tenant, name) or self.has_alias(tenant, name)):
            remedy = f"{name!r} is there, and no version of it that is kept starts with {prefix}"
        else:
            remedy = suggest(self._read, tenant, name, aliases=True)
        return AdapterNotFound(f"no adapter {reference!r}", subject=reference, remedy=remedy)

    def _read(self, sql: str, values: tuple[Any, ...] | Mapping[str, Any] = ()) -> list[Row]:
        # fetchall: a statement that is not read to its end would keep its snapshot, and all later reads old.
        with self._read_lock, schema.catalog_errors():
            return self._reader.execute(sql, values).fetchall()

    def _record(self, tenant: str, row: Row) -> AdapterRecord:
        (
            name,
            digest,
            spec,
            corrupt,
            labels,
            pinned,
            merge,
            created,
            updated,
            aliases,
            bases,
            replays,
            kept,
            *lifetime,
        ) = row
        return AdapterRecord(
            id=AdapterId(tenant, name),
            digest=digest,
            spec=self._spec(spec),
            labels=json.loads(labels),
            aliases=tuple(sorted(aliases.split(","))) if aliases else (),
            pinned=bool(pinned),
            merge=bool(merge),
            bases=frozenset(bases.split(",")),
            created=created,
            updated=updated,
            health=_health(corrupt),
            lifetime=_lifetime(*lifetime),
            replays={base: ReplayRecord(**values) for base, values in json.loads(replays).items()},
            versions=tuple(kept.split(",")),
        )


def _health(corrupt: int) -> Health:
    return Health.CORRUPT if corrupt else Health.OK


def _lifetime(row: int | None, expires: float | None, max_uses: int | None, uses: int | None) -> Lifetime | None:
    if row is None:
        return None
    return Lifetime(expires, max_uses, None if max_uses is None else max_uses - (uses or 0))

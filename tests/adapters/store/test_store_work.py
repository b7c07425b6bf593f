"""What calls cost in a store of many adapters: counted in SQLite's steps and in operations on files, never in time."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound, QuotaExceeded
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, Quotas
from support.stores import (
    BASE,
    TENANT,
    SteppedDisk,
    content,
    digest_of,
    manifest_of,
    new_id,
    put,
    quick_store,
    spec_of,
    stage,
)
from support.tallies import check_tallies

FEW, MANY = 20, 600
STEPS = 10  # between two calls of SQLite's progress handler
SHARDS = 256


class Work:
    """Counts while a store is used."""

    def __init__(self) -> None:
        self.steps = 0
        self.files: Counter[str] = Counter()

    def connect(self, path: Path, busy_seconds: float) -> sqlite3.Connection:
        connection = schema.connect(path, busy_seconds)
        connection.execute("PRAGMA synchronous = OFF")
        connection.set_progress_handler(self._count, STEPS)
        return connection

    def operation(self, operation: str, path: Path) -> None:
        self.files[operation] += 1

    def _count(self) -> int:
        self.steps += STEPS
        return 0

    def of(self, call: Callable[[], object]) -> tuple[int, int]:
        """(steps of SQLite, operations on files) of one call."""
        self.steps, self.files = 0, Counter()
        call()
        return self.steps, self.files.total()


def name(number: int) -> str:
    return f"adapter-{number:06}"


@contextmanager
def filled(root: Path, count: int, quotas: Quotas) -> Iterator[tuple[LocalStore, Work]]:
    """A store of `count` adapters, some of which end by themselves, and what counts its work from its opening on."""
    with quick_store(root, quotas) as store:
        for number in range(count):
            put(store, name(number), content(f"{number}", 64), **({"ttl_seconds": 1e6} if number % 4 == 0 else {}))
    work = Work()
    with LocalStore(root, quotas, disk=SteppedDisk(work.operation), connect=work.connect) as store:
        yield store, work


def costs(root: Path, count: int, quotas: Quotas | None = None) -> dict[str, tuple[int, int]]:
    """What each kind of call costs in a store of `count` adapters."""
    with filled(root, count, quotas or Quotas(keep_versions=2)) as (store, work):

        def absent() -> None:
            with pytest.raises(AdapterNotFound):
                store.acquire(TENANT, "adapter-nobody")

        def publish(seed: str, **more: object) -> tuple[int, int]:
            files = content(seed, 64)
            upload_id = stage(store, "new", files, **more)
            return work.of(lambda: store.publish(TENANT, upload_id, spec_of(files), BASE))

        digest = digest_of(content("3", 64))
        found = {
            "first page": work.of(lambda: store.list(TENANT, 10)),
            "a page in the midst": work.of(lambda: store.list(TENANT, 10, store.list(TENANT, 7).next_page_token)),
            "get": work.of(lambda: store.get(TENANT, name(3))),
            "acquire": work.of(lambda: store.acquire(TENANT, name(3), counts=True)),
            "first use": work.of(lambda: (store.accepted_bases(digest), store.files(digest))),
            "release": work.of(lambda: store.release(digest)),
            "begin": work.of(lambda: store.begin_upload(TENANT, new_id(), manifest_of("new", content("x", 64)))),
            "publish": publish("n0"),
            "replace": publish("n1"),
            "replace, one goes": publish("n2"),
            "desired state": work.of(lambda: store.update(TENANT, "new", AdapterUpdate(pinned=True))),
            "read it": work.of(store.desired_state),
            "names": work.of(lambda: store.names([digest])),
            "delete": work.of(lambda: store.delete(TENANT, "new")),
            "collect": work.of(store.collect),
            "expire": work.of(store.expire),
            "next expiry": work.of(store.next_expiry),
            "publish with an end": publish("n3", ttl_seconds=1e5, max_uses=2),
            "absent": work.of(absent),
        }
        check_tallies(root)
        return found


def test_no_call_costs_more_with_more_adapters(tmp_path: Path) -> None:
    few, many = costs(tmp_path / "few", FEW), costs(tmp_path / "many", MANY)
    grown = {call: (few[call], many[call]) for call in few if many[call][1] > few[call][1]}
    assert not grown, "operations on files"
    # The nearest names of an absent one are read up to a fixed number.
    steps = {call: (few[call][0], many[call][0]) for call in few if call != "absent"}
    assert {call: pair for call, pair in steps.items() if pair[1] > 1.2 * pair[0] + 2 * STEPS} == {}
    assert many["absent"][0] < 6000


def test_room_is_made_by_looking_at_no_other_adapter(tmp_path: Path) -> None:
    """At its quota of bytes every publish lets a superseded version go."""
    entry_bytes = sum(len(data) for data in content("000", 64).values())

    def replace(count: int) -> tuple[int, int]:
        root = tmp_path / str(count)
        quotas = Quotas(max_bytes=(count + 2) * entry_bytes, keep_versions=3)
        with filled(root, count, quotas) as (store, work):
            taken = (0, 0)
            for number in range(6):
                files = content(f"v{number}", 64)
                upload_id = stage(store, name(count - 1), files)
                taken = work.of(lambda: store.publish(TENANT, upload_id, spec_of(files), BASE))  # noqa: B023
            with pytest.raises(QuotaExceeded):
                put(store, "large", content("large", 3 * entry_bytes + 64))
            check_tallies(root)
            return taken

    few, many = replace(FEW + 3), replace(MANY + 3)
    assert many[1] <= few[1]
    assert many[0] <= 1.2 * few[0] + 2 * STEPS


def test_a_start_opens_no_adapter(tmp_path: Path) -> None:
    """It lists directories, of which there are at most 256, and reads the catalog once."""
    for count in (FEW, MANY):
        root = tmp_path / str(count)
        with quick_store(root) as store:
            for number in range(count):
                put(store, name(number), content(f"{number}", 64))
        listed = Counter[str]()

        class Counting(SteppedDisk):
            def children(self, path: Path) -> list[Path]:
                listed["children"] += 1  # noqa: B023
                return super().children(path)

        work = Work()
        with LocalStore(root, disk=Counting(work.operation), connect=work.connect):
            assert listed["children"] <= SHARDS + 16
            assert work.files.total() <= 32, work.files
            assert work.steps <= 250 * count + 5000


@pytest.mark.parametrize("lacks", ["everything", "nothing"])
def test_a_catalog_without_tallies_gets_them_when_it_is_opened(tmp_path: Path, lacks: str) -> None:
    with quick_store(tmp_path, Quotas(keep_versions=2)) as store:
        for number in range(12):
            put(store, name(number % 5), content(f"{number}", 64), tenant=("red", "blue")[number % 2])
        store.acquire("red", name(0))
        store.delete("red", name(0))
    if lacks == "everything":
        with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as catalog:
            triggers = [row[0] for row in catalog.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'")]
            for trigger in triggers:
                catalog.execute(f"DROP TRIGGER {trigger}")
            for table in ("tenants", "tenant_blobs", "superseded", "loose_versions", "loose_blobs"):
                catalog.execute(f"DROP TABLE {table}")
            catalog.commit()
    with quick_store(tmp_path, Quotas(keep_versions=2)) as store:
        check_tallies(tmp_path)
        put(store, name(1), content("again", 64), tenant="red")
        check_tallies(tmp_path)

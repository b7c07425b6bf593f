"""Names that end by themselves: at a time, or with their last use; and that nothing of them stays."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, StoreUnavailable
from loramux_adapters.names import MAX_TTL_SECONDS, MAX_USES
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, Quotas
from loramux_adapters.store.repair import repair
from support.stores import (
    TENANT,
    FaultyConnection,
    blob_files,
    content,
    digest_of,
    manifest_of,
    new_id,
    put,
    quick_store,
    stage,
    stored,
)

FILES = content("one")
DIGEST = digest_of(FILES)
START = 1_000_000.0


class Clock:
    """Wall time as a test sets it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[LocalStore]:
    with quick_store(tmp_path, Quotas(keep_versions=2), clock=clock) as store:
        yield store


def use(store: LocalStore, name: str = "one") -> str:
    """A request that is accepted and whose use is counted; its hold stays."""
    version = store.acquire(TENANT, name, counts=True)
    if version.use is not None:
        store.count_use(version.use)
    return version.digest


def rows(root: Path) -> dict[str, int]:
    """How many rows each table of the catalog has."""
    with closing(sqlite3.connect(root / "catalog.sqlite3")) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in tables
            if not table.startswith("sqlite_")
        }


# Time


def test_a_name_is_gone_at_its_time_even_before_anything_removes_it(store: LocalStore, clock: Clock) -> None:
    put(store, "one", FILES, ttl_seconds=60.0)
    put(store, "two", content("two"))
    store.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    clock.now = START + 59.9
    lifetime = store.get(TENANT, "one").lifetime
    assert lifetime is not None
    assert (lifetime.expires, lifetime.max_uses, lifetime.uses_left) == (START + 60, None, None)
    assert store.get(TENANT, "two").lifetime is None
    assert [record.id.name for record in store.list(TENANT).records] == ["one", "two"]
    clock.now = START + 60
    for reference in ("one", "uno"):
        with pytest.raises(AdapterNotFound, match="its time is over; upload it again"):
            store.acquire(TENANT, reference)
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, reference, DIGEST[:8])
    assert [record.id.name for record in store.list(TENANT).records] == ["two"]


def test_expiring_removes_rows_and_bytes_and_says_what_is_gone(store: LocalStore, clock: Clock, tmp_path: Path) -> None:
    put(store, "one", FILES, ttl_seconds=60.0)
    put(store, "two", content("two"), ttl_seconds=90.0)
    assert (store.next_expiry(), store.expire()) == (START + 60, 0)
    clock.now = START + 75
    assert store.expire() == 1
    assert store.take_removed() == {DIGEST}
    assert len(blob_files(tmp_path)) == 2
    assert store.next_expiry() == START + 90
    clock.now = START + 100
    assert store.expire() == 1
    assert blob_files(tmp_path) == set()
    assert store.next_expiry() is None
    assert set(rows(tmp_path).values()) == {0}


def test_what_a_request_holds_stays_until_its_end(store: LocalStore, clock: Clock, tmp_path: Path) -> None:
    put(store, "one", FILES, ttl_seconds=60.0)
    store.acquire(TENANT, "one")
    clock.now = START + 61
    store.expire()
    assert stored(store, DIGEST) == FILES
    assert store.take_removed() == frozenset()
    assert store.release(DIGEST)
    store.collect()
    assert blob_files(tmp_path) == set()


def test_a_restart_keeps_the_deadline_and_sweeps_what_passed_it(tmp_path: Path, clock: Clock) -> None:
    with quick_store(tmp_path, clock=clock) as store:
        put(store, "soon", FILES, ttl_seconds=60.0)
        put(store, "late", content("late"), ttl_seconds=600.0)
    clock.now = START + 100
    with quick_store(tmp_path, clock=clock) as store:
        assert [record.id.name for record in store.list(TENANT).records] == ["late"]
        assert rows(tmp_path)["names"] == 1
        assert len(blob_files(tmp_path)) == 2
        assert store.next_expiry() == START + 600


def test_an_upload_says_anew_how_long_the_name_stays(store: LocalStore, clock: Clock) -> None:
    put(store, "one", FILES, ttl_seconds=60.0)
    clock.now = START + 50
    assert not put(store, "one", FILES, ttl_seconds=60.0).created
    assert store.next_expiry() == START + 110
    assert put(store, "one", content("two"), ttl_seconds=10.0).created
    assert store.next_expiry() == START + 60
    put(store, "one", content("two"))
    assert (store.get(TENANT, "one").lifetime, store.next_expiry()) == (None, None)
    clock.now = START + 1e6
    assert store.expire() == 0
    assert store.get(TENANT, "one").digest == digest_of(content("two"))


@pytest.mark.parametrize("lifetime", [{"ttl_seconds": 60.0}, {"max_uses": 1}])
def test_a_name_without_an_end_is_not_given_one_in_passing(store: LocalStore, lifetime: dict[str, float]) -> None:
    """It would take the versions before it along."""
    upload_id = stage(store, "one", content("two"), **lifetime)
    put(store, "one", FILES)
    with pytest.raises(AdapterConflict, match="'one' has no end; choose another name for this upload, or delete 'one'"):
        store.publish(TENANT, upload_id, store.get(TENANT, "one").spec, "b" * 64)
    with pytest.raises(AdapterConflict, match="'one' has no end"):
        store.begin_upload(TENANT, new_id(), manifest_of("one", FILES, **lifetime))
    store.delete(TENANT, "one")
    put(store, "one", FILES, **lifetime)
    assert store.get(TENANT, "one").lifetime is not None


def test_an_expired_name_takes_no_place_and_can_be_given_again(tmp_path: Path, clock: Clock) -> None:
    with quick_store(tmp_path, Quotas(max_adapters=1), clock=clock) as store:
        put(store, "one", FILES, ttl_seconds=1.0)
        store.update(TENANT, "one", AdapterUpdate(add_aliases=("two",), pinned=True))
        clock.now += 2
        put(store, "two", content("two"))
        assert [record.id.name for record in store.list(TENANT).records] == ["two"]
        clock.now += 2
        store.delete(TENANT, "two")
        put(store, "two", FILES, ttl_seconds=1.0)
        clock.now += 2
        assert put(store, "two", FILES).record.lifetime is None


def test_an_upload_under_way_keeps_its_end_over_a_restart_and_a_resume_says_it_anew(
    tmp_path: Path, clock: Clock
) -> None:
    with quick_store(tmp_path, clock=clock) as store:
        upload_id = stage(store, "one", FILES, ttl_seconds=60.0, max_uses=3)
    with quick_store(tmp_path, clock=clock) as store:
        manifest = store.staged_files(TENANT, upload_id).manifest
        assert (manifest.ttl_seconds, manifest.max_uses) == (60.0, 3)
        store.begin_upload(TENANT, upload_id, manifest_of("one", FILES, ttl_seconds=5.0))
        manifest = store.staged_files(TENANT, upload_id).manifest
        assert (manifest.ttl_seconds, manifest.max_uses) == (5.0, None)


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf"), MAX_TTL_SECONDS * 1.01])
def test_no_end_before_now_or_beyond_reason(store: LocalStore, ttl: float) -> None:
    with pytest.raises(AdapterInvalid, match="ttl_seconds") as caught:
        store.begin_upload(TENANT, new_id(), manifest_of("one", FILES, ttl_seconds=ttl))
    assert caught.value.subject == "ttl_seconds"
    assert f"over 0 and at most {MAX_TTL_SECONDS}" in str(caught.value)


@pytest.mark.parametrize("uses", [0, -1, MAX_USES + 1])
def test_at_least_one_use(store: LocalStore, uses: int) -> None:
    with pytest.raises(AdapterInvalid, match=f"must be 1 to {MAX_USES}") as caught:
        store.begin_upload(TENANT, new_id(), manifest_of("one", FILES, max_uses=uses))
    assert caught.value.subject == "max_uses"


# Uses


def test_the_last_use_takes_the_name_away_and_its_end_the_bytes(store: LocalStore, tmp_path: Path) -> None:
    put(store, "one", FILES, max_uses=2)
    use(store)
    lifetime = store.get(TENANT, "one").lifetime
    assert lifetime is not None
    assert (lifetime.max_uses, lifetime.uses_left) == (2, 1)
    use(store)
    with pytest.raises(AdapterNotFound):
        store.acquire(TENANT, "one", counts=True)
    assert rows(tmp_path)["names"] == 0
    assert stored(store, DIGEST) == FILES
    store.release(DIGEST)
    assert store.release(DIGEST)
    store.collect()
    assert store.take_removed() == {DIGEST}
    assert blob_files(tmp_path) == set()
    assert set(rows(tmp_path).values()) == {0}


def test_accepted_requests_and_counted_ones_together_never_exceed_the_uses(store: LocalStore) -> None:
    put(store, "one", FILES, max_uses=2)
    first, second = (store.acquire(TENANT, "one", counts=True) for _ in range(2))
    assert first.use is not None
    assert second.use is not None
    with pytest.raises(AdapterNotFound, match="all 2 uses are taken; upload it again"):
        store.acquire(TENANT, "one", counts=True)
    store.give_back_use(second.use)  # refused for another reason
    third = store.acquire(TENANT, "one", counts=True)
    assert third.use is not None
    store.count_use(first.use)
    with pytest.raises(AdapterNotFound, match="uses are taken"):
        store.acquire(TENANT, "one", counts=True)
    store.give_back_use(third.use)
    use(store)
    with pytest.raises(AdapterNotFound):
        store.acquire(TENANT, "one", counts=True)


def test_reading_is_no_use_and_a_name_without_limit_counts_nothing(store: LocalStore) -> None:
    put(store, "one", FILES, max_uses=1)
    put(store, "two", FILES)
    for _ in range(3):
        assert store.acquire(TENANT, "one").use is None
        assert store.acquire(TENANT, "two", counts=True).use is None
    assert store.acquire(TENANT, "one", DIGEST[:8], counts=True).use is not None


def test_uses_outlive_a_restart_and_those_that_were_not_counted_never_were(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        put(store, "one", FILES, max_uses=2)
        use(store)
        store.acquire(TENANT, "one", counts=True)  # nothing was told to its caller
    with quick_store(tmp_path) as store:
        use(store)
        with pytest.raises(AdapterNotFound):
            store.acquire(TENANT, "one", counts=True)


def test_a_use_of_what_the_name_was_before_is_no_use_of_what_it_is_now(store: LocalStore) -> None:
    put(store, "one", FILES, max_uses=1)
    before = store.acquire(TENANT, "one", counts=True)
    put(store, "one", content("two"), max_uses=1)
    assert before.use is not None
    store.count_use(before.use)
    assert use(store) == digest_of(content("two"))


def test_a_use_that_could_not_be_counted_is_given_back(tmp_path: Path) -> None:
    class Faulty(FaultyConnection):
        pass

    with LocalStore(tmp_path, connect=lambda path, busy: sqlite3_connect(path, busy, Faulty)) as store:
        put(store, "one", FILES, max_uses=1)
        version = store.acquire(TENANT, "one", counts=True)
        assert version.use is not None
        Faulty.statement = "UPDATE lifetimes"
        with pytest.raises(StoreUnavailable):
            store.count_use(version.use)
        Faulty.statement = ""
        use(store)
        with pytest.raises(AdapterNotFound):
            store.acquire(TENANT, "one", counts=True)


def sqlite3_connect(path: Path, busy: float, factory: type[sqlite3.Connection]) -> sqlite3.Connection:
    from loramux_adapters.store import schema

    return schema.connect(path, busy, factory)


KILLED = """
import os, sys
from pathlib import Path
from loramux_adapters.store.local import LocalStore
from support.stores import TENANT
store = LocalStore(Path(sys.argv[1]))
for _ in range(3):
    version = store.acquire(TENANT, "one", counts=True)
    store.count_use(version.use)
    print("told", flush=True)
os.kill(os.getpid(), 9)
"""


def test_uses_that_callers_were_told_of_survive_a_kill(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        put(store, "one", FILES, max_uses=4)
    source = textwrap.dedent(KILLED)
    tests = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path)],
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (-9, "told\n" * 3), ended.stderr
    with LocalStore(tmp_path) as store:
        lifetime = store.get(TENANT, "one").lifetime
        assert lifetime is not None
        assert lifetime.uses_left == 1


# What stays


def test_thousands_of_them_leave_nothing_behind(store: LocalStore, clock: Clock, tmp_path: Path) -> None:
    for number in range(1000):
        files = content(f"{number}", 64)
        if number % 2:
            put(store, f"e{number}", files, ttl_seconds=1.0)
        else:
            put(store, f"e{number}", files, max_uses=1)
            store.release(use(store, f"e{number}"))
        if number % 100 == 99:
            clock.now += 2
            store.expire()
    store.collect()
    assert set(rows(tmp_path).values()) == {0}
    kept = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm", "lock", "reserve"}
    assert blob_files(tmp_path) == set()
    assert list((tmp_path / "uploads").glob("*/*")) == []
    assert not (tmp_path / "published.jsonl").exists()
    assert not (tmp_path / "lost").exists()


def test_only_names_that_stay_are_journaled(store: LocalStore, tmp_path: Path) -> None:
    """A restored one would have no end any more."""
    put(store, "one", FILES, ttl_seconds=60.0)
    put(store, "two", content("two"))
    journal = tmp_path / "published.jsonl"
    assert (b'"one"' in journal.read_bytes(), b'"two"' in journal.read_bytes()) == (False, True)
    store.close()
    with quick_store(tmp_path, clock=Clock()):
        assert (b'"one"' in journal.read_bytes(), b'"two"' in journal.read_bytes()) == (False, True)


def test_a_repair_keeps_the_ends(tmp_path: Path, clock: Clock) -> None:
    with quick_store(tmp_path, clock=clock) as store:
        put(store, "one", FILES, ttl_seconds=60.0, max_uses=3)
        use(store)
        put(store, "gone", content("gone"), ttl_seconds=60.0)
    for entry in manifest_of("gone", content("gone")).files:
        (tmp_path / "blobs" / entry.sha256[:2] / entry.sha256).unlink()
    assert repair(tmp_path, rebuild=True) is not None
    with quick_store(tmp_path, clock=clock) as store:
        lifetime = store.get(TENANT, "one").lifetime
        assert lifetime is not None
        assert (lifetime.expires, lifetime.max_uses, lifetime.uses_left) == (START + 60, 3, 2)
        assert rows(tmp_path)["lifetimes"] == 1


def test_a_repair_of_a_catalog_without_ends_finds_none(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        put(store, "one", FILES)
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as connection:
        connection.execute("DROP TABLE lifetimes")
    report = repair(tmp_path, rebuild=True)
    assert report is not None
    assert (report.kept, report.unread) == ((f"{TENANT}/one",), {})
    with quick_store(tmp_path) as store:
        assert store.get(TENANT, "one").lifetime is None

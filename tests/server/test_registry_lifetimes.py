"""Adapters that end by themselves, through the registry: who is told, what running requests keep, what is left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound, StoreUnavailable
from loramux_adapters.store.records import AdapterUpdate
from loramux_server.registry import Registry
from loramux_server.registry_expiry import ExpiryThread
from support.caches import Caches, desired
from support.stores import BASE, TENANT, blob_files, content, digest_of, manifest_of, new_id, quick_store, read_facts

pytestmark = pytest.mark.asyncio
FILES = content("one")
DIGEST = digest_of(FILES)


class Clock:
    """Wall time as a test sets it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def caches() -> Caches:
    return Caches()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, caches: Caches, clock: Clock) -> Iterator[Registry]:
    registry = Registry(quick_store(tmp_path, clock=clock), read_facts, BASE, caches, clock)
    yield registry
    registry.close()


async def push(registry: Registry, name: str, **lifetime: float) -> None:
    upload_id = new_id()
    await registry.begin_upload(TENANT, upload_id, manifest_of(name, FILES, **lifetime))
    for file, data in FILES.items():
        await registry.write_chunk(TENANT, upload_id, file, 0, data)
    await registry.publish(TENANT, upload_id)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 -- the state of another thread
            await asyncio.sleep(0.005)


async def test_a_name_is_removed_at_its_time_without_anybody_asking(
    registry: Registry, caches: Caches, clock: Clock, tmp_path: Path
) -> None:
    await push(registry, "one", ttl_seconds=5.0)
    await registry.update(TENANT, "one", AdapterUpdate(pinned=True))
    assert caches.desired[-1] == desired(DIGEST)
    clock.now += 6
    registry._expiry.look()
    await until(lambda: caches.evicted == [DIGEST])
    assert caches.desired[-1] == desired()
    assert blob_files(tmp_path) == set()


async def test_a_request_that_was_accepted_before_keeps_its_version(
    registry: Registry, caches: Caches, clock: Clock, tmp_path: Path
) -> None:
    await push(registry, "one", ttl_seconds=5.0)
    resolved = registry.resolve(TENANT, "one")
    clock.now += 6
    with pytest.raises(AdapterNotFound):
        registry.resolve(TENANT, "one")
    registry._expiry.look()
    await until(lambda: registry._store.next_expiry() is None)
    await asyncio.sleep(0.02)
    assert (caches.evicted, len(blob_files(tmp_path))) == ([], 2)
    resolved.release()
    await until(lambda: caches.evicted == [DIGEST])
    assert blob_files(tmp_path) == set()


async def test_the_last_use_ends_the_name_and_its_release_the_rest(
    registry: Registry, caches: Caches, tmp_path: Path
) -> None:
    await push(registry, "one", max_uses=2)
    await registry.update(TENANT, "one", AdapterUpdate(merge=True))
    first, second = registry.resolve(TENANT, "one"), registry.resolve(TENANT, "one")
    with pytest.raises(AdapterNotFound, match="uses are taken"):
        registry.resolve(TENANT, "one")
    await first.confirm()
    await first.confirm()
    assert caches.desired[-1] == desired("", DIGEST)
    await second.confirm()
    assert caches.desired[-1] == desired()
    first.release()
    await asyncio.sleep(0.02)
    assert caches.evicted == []
    second.release()
    await until(lambda: caches.evicted == [DIGEST])
    assert blob_files(tmp_path) == set()


async def test_what_is_refused_or_downloaded_is_no_use(registry: Registry) -> None:
    await push(registry, "one", max_uses=1)
    for _ in range(3):
        registry.resolve(TENANT, "one").release()  # refused before it was confirmed
        with await registry.download(TENANT, "one") as download:
            assert [chunk.file async for chunk in download.chunks()]
    with registry.resolve(TENANT, "one") as resolved:
        await resolved.confirm()
    with pytest.raises(AdapterNotFound):
        registry.resolve(TENANT, "one")


async def test_a_use_that_cannot_be_counted_is_none(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoreUnavailable("the disk is full")

    await push(registry, "one", max_uses=1)
    monkeypatch.setattr(registry._store._catalog, "transaction", fail)
    with registry.resolve(TENANT, "one") as resolved, pytest.raises(StoreUnavailable):
        await resolved.confirm()
    monkeypatch.undo()
    with registry.resolve(TENANT, "one") as resolved:
        await resolved.confirm()


async def test_a_caller_that_goes_away_while_its_use_is_counted_has_used_it(registry: Registry) -> None:
    """It would be neither taken nor given back where the thread had not begun."""
    await push(registry, "one", max_uses=2)
    going_on = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        busy = threads.submit(going_on.wait, 60)
        resolved = registry.resolve(TENANT, "one")
        call = asyncio.ensure_future(resolved.confirm())
        for _ in range(5):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        resolved.release()
        going_on.set()
        await until(lambda: busy.done() and not registry._store._ends._uses._open)
        lifetime = (await registry.get(TENANT, "one")).lifetime
        assert lifetime is not None
        assert lifetime.uses_left == 1


@pytest.mark.parametrize("change", ["update", "begin"])
async def test_what_another_change_finds_over_leaves_nothing_either(
    registry: Registry, caches: Caches, clock: Clock, tmp_path: Path, change: str
) -> None:
    """Whoever comes first, this change or the thread that removes what is over."""
    await push(registry, "one", ttl_seconds=5.0)
    clock.now += 6
    if change == "update":
        with pytest.raises(AdapterNotFound):
            await registry.update(TENANT, "one", AdapterUpdate(pinned=True))
    else:
        await registry.begin_upload(TENANT, new_id(), manifest_of("two", content("two")))
    await until(lambda: caches.evicted == [DIGEST] and not blob_files(tmp_path))


async def test_a_restart_ends_what_is_due(tmp_path: Path) -> None:
    clock = Clock()
    registry = Registry(quick_store(tmp_path, clock=clock), read_facts, BASE, Caches(), clock)
    await push(registry, "one", ttl_seconds=5.0)
    registry.close()
    assert len(blob_files(tmp_path)) == 2
    clock.now += 5
    Registry(quick_store(tmp_path, clock=clock), read_facts, BASE, Caches(), clock).close()
    assert blob_files(tmp_path) == set()


async def test_the_thread_waits_for_the_next_end_and_tries_again_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    due: list[float] = []
    removed = threading.Event()
    failures = [StoreUnavailable("the disk is full")]

    def expire() -> None:
        if failures:
            due[0] = time.time() - 1
            raise failures.pop()
        due.clear()
        removed.set()

    thread = ExpiryThread(lambda: due[0] if due else None, expire)
    due.append(time.time() - 1)
    thread.look()
    await until(lambda: "could not be removed" in caplog.text)
    thread.look()
    assert await asyncio.to_thread(removed.wait, 30)
    removed.clear()
    due.append(time.time() + 0.3)
    thread.look()
    assert await asyncio.to_thread(removed.wait, 30)
    thread.close()
    thread.close()

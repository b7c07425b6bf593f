"""What the caches of adapters get from the registry: the desired state after each change of a name, and evictions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound, StoreUnavailable
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.store.records import AdapterUpdate, DesiredState, Quotas
from loramux_server.registry import Registry
from support.caches import Caches, desired
from support.stores import BASE, TENANT, content, digest_of, manifest_of, quick_store, read_facts

pytestmark = pytest.mark.asyncio
ONE, TWO, THREE = (digest_of(content(seed)) for seed in ("one", "two", "three"))


@pytest.fixture
def caches() -> Caches:
    return Caches()


@pytest.fixture
def registry(tmp_path: Path, caches: Caches) -> Iterator[Registry]:
    registry = Registry(quick_store(tmp_path, Quotas(keep_versions=2)), read_facts, BASE, caches)
    yield registry
    registry.close()


async def push(registry: Registry, name: str, seed: str) -> None:
    files = content(seed)
    upload_id = f"upload-{name}-{seed}"
    await registry.begin_upload(TENANT, upload_id, manifest_of(name, files))
    for file, data in files.items():
        await registry.write_chunk(TENANT, upload_id, file, 0, data)
    await registry.publish(TENANT, upload_id)


BOTH = AdapterUpdate(pinned=True, merge=True)


async def test_what_is_published_is_offered_and_what_is_refused_is_not(
    registry: Registry, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(registry, "a", "one")
    await push(registry, "b", "one")  # the same content
    assert caches.offered == [ONE, ONE]

    def fail(*_: object) -> None:
        raise StoreUnavailable("the disk fails")

    monkeypatch.setattr(registry._store, "publish", fail)
    with pytest.raises(StoreUnavailable):
        await push(registry, "c", "two")
    assert caches.offered == [ONE, ONE]


async def test_what_is_deleted_before_it_is_offered_is_not_kept(registry: Registry, caches: Caches) -> None:
    class Late(Caches):
        def offer(self, weights: Weights) -> None:
            asyncio.run_coroutine_threadsafe(registry.delete(TENANT, "a"), loop).result(30)
            super().offer(weights)

    loop, late = asyncio.get_running_loop(), Late()
    late.desired = caches.desired
    registry._caches = registry._publisher._caches = late
    await push(registry, "a", "one")
    assert late.offered == [ONE]
    assert late.evicted == [ONE, ONE]  # by the delete, and once more for what came after it


async def test_every_change_of_a_name_tells_the_whole_desired_state(registry: Registry, caches: Caches) -> None:
    await push(registry, "a", "one")
    await push(registry, "b", "two")
    await registry.update(TENANT, "a", AdapterUpdate(merge=True))
    await registry.update(TENANT, "b", AdapterUpdate(pinned=True))
    await registry.update(TENANT, "b", AdapterUpdate(add_aliases=("c",)))
    await registry.update(TENANT, "a", AdapterUpdate(merge=False))
    await registry.delete(TENANT, "b")
    assert caches.desired == [
        desired(),  # at the start
        desired(),
        desired(),
        desired(merged=ONE),
        desired(TWO, ONE),
        desired(TWO, ONE),
        desired(TWO),
        desired(),
    ]


async def test_only_what_asks_again_is_tried_again(registry: Registry, caches: Caches) -> None:
    await push(registry, "a", "one")
    await registry.update(TENANT, "a", BOTH)
    await registry.update(TENANT, "a", AdapterUpdate(set_labels={"k": "v"}, pinned=False))
    await push(registry, "b", "two")
    await push(registry, "a", "one")  # what was wrong with it may be right now
    await registry.delete(TENANT, "b")
    assert caches.retries == [None, ONE, ONE, None, TWO, ONE, None]


async def test_a_restart_tells_the_desired_state_at_once(tmp_path: Path) -> None:
    registry = Registry(quick_store(tmp_path), read_facts, BASE, Caches())
    await push(registry, "a", "one")
    await registry.update(TENANT, "a", BOTH)
    registry.close()
    caches = Caches()
    Registry(quick_store(tmp_path), read_facts, BASE, caches).close()
    assert caches.desired == [desired(ONE, ONE)]


async def test_desired_state_follows_its_name_and_what_it_left_is_evicted_later(
    registry: Registry, caches: Caches
) -> None:
    await push(registry, "a", "one")
    await registry.update(TENANT, "a", BOTH)
    await push(registry, "a", "two")
    assert (caches.desired[-1], caches.evicted) == (desired(TWO, TWO), [])  # name@digest reaches it still
    await push(registry, "a", "three")
    assert (caches.desired[-1], caches.evicted) == (desired(THREE, THREE), [ONE])


async def test_a_delete_lets_everything_go(registry: Registry, caches: Caches) -> None:
    await push(registry, "a", "one")
    await registry.update(TENANT, "a", BOTH)
    await registry.delete(TENANT, "a")
    assert (caches.desired[-1], caches.evicted) == (desired(), [ONE])


async def test_a_delete_of_nothing_tells_nothing(registry: Registry, caches: Caches) -> None:
    with pytest.raises(AdapterNotFound):
        await registry.delete(TENANT, "a")
    assert (caches.desired, caches.evicted) == ([desired()], [])


async def test_what_another_name_desires_stays(registry: Registry, caches: Caches) -> None:
    for name in ("a", "b"):
        await push(registry, name, "one")
        await registry.update(TENANT, name, BOTH)
    await registry.delete(TENANT, "a")
    assert (caches.desired[-1], caches.evicted) == (desired(ONE, ONE), [])
    await registry.delete(TENANT, "b")
    assert (caches.desired[-1], caches.evicted) == (desired(), [ONE])


async def test_a_running_request_holds_it_until_its_end(registry: Registry, caches: Caches) -> None:
    await push(registry, "a", "one")
    with registry.resolve(TENANT, "a"):
        await registry.delete(TENANT, "a")
        assert caches.evicted == []
    async with asyncio.timeout(5):
        while not caches.evicted:  # noqa: ASYNC110 -- the collection runs on a thread of its own
            await asyncio.sleep(0.005)
    assert caches.evicted == [ONE]


async def test_desired_state_that_cannot_be_read_do_not_fail_a_change_that_is_durable(
    registry: Registry, caches: Caches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> DesiredState:
        raise StoreUnavailable("the store's catalog is locked")

    await push(registry, "a", "one")
    monkeypatch.setattr(registry._store, "desired_state", fail)
    assert (await registry.update(TENANT, "a", BOTH)).merge
    assert "the desired state could not be read" in caplog.text
    monkeypatch.undo()
    await registry.update(TENANT, "a", AdapterUpdate(add_aliases=("b",)))
    assert caches.desired[-1] == desired(ONE, ONE)


async def test_of_changes_at_once_the_last_told_knows_of_all(
    registry: Registry, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told out of order, an older reading would stand until the next change."""
    names = [f"n{index}" for index in range(6)]
    for name in names:
        await push(registry, name, name)
    read, delays = registry._store.desired_state, iter(range(len(names), 0, -1))

    def read_slowly() -> DesiredState:
        found = read()
        time.sleep(next(delays) * 0.01)  # whoever reads later is sooner done
        return found

    monkeypatch.setattr(registry._store, "desired_state", read_slowly)
    await asyncio.gather(*(registry.update(TENANT, name, AdapterUpdate(pinned=True)) for name in names))
    counts = [len(told.pinned) for told in caches.desired]
    assert counts == sorted(counts)
    assert counts[-1] == len(names)

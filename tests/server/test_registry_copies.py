"""What the registry tells those who hold copies of an adapter when its name moves on or goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorica_adapters.errors import AdapterNotFound
from lorica_adapters.store.records import Quotas
from lorica_server.registry import Registry
from support.stores import BASE, TENANT, content, digest_of, manifest_of, quick_store, read_spec

pytestmark = pytest.mark.asyncio
ONE, TWO, THREE = (digest_of(content(seed)) for seed in ("one", "two", "three"))


class Copies:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.dropped: list[str] = []

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def want_materialised(self, digest: str, wanted: bool) -> None:
        assert not wanted
        self.dropped.append(digest)


@pytest.fixture
def copies() -> Copies:
    return Copies()


@pytest.fixture
def registry(tmp_path: Path, copies: Copies) -> Iterator[Registry]:
    registry = Registry(quick_store(tmp_path, Quotas(keep_versions=2)), read_spec, BASE, copies)
    yield registry
    registry.close()


async def push(registry: Registry, name: str, seed: str) -> None:
    files = content(seed)
    upload_id = f"upload-{name}-{seed}"
    await registry.begin_upload(TENANT, upload_id, manifest_of(name, files))
    for file, data in files.items():
        await registry.write_chunk(TENANT, upload_id, file, 0, data)
    await registry.publish(TENANT, upload_id)


async def test_a_delete_lets_everything_go(registry: Registry, copies: Copies) -> None:
    await push(registry, "a", "one")
    assert (copies.dropped, copies.forgotten) == ([], [])
    await registry.delete(TENANT, "a")
    assert (copies.dropped, copies.forgotten) == ([ONE], [ONE])


async def test_a_delete_of_nothing_tells_nothing(registry: Registry, copies: Copies) -> None:
    with pytest.raises(AdapterNotFound):
        await registry.delete(TENANT, "a")
    assert (copies.dropped, copies.forgotten) == ([], [])


async def test_a_switch_drops_the_dense_copy_and_later_the_rest(registry: Registry, copies: Copies) -> None:
    await push(registry, "a", "one")
    await push(registry, "a", "two")
    assert (copies.dropped, copies.forgotten) == ([ONE], [])  # name@digest reaches it still
    await push(registry, "a", "three")
    assert (copies.dropped, copies.forgotten) == ([ONE, TWO], [ONE])


async def test_the_same_content_again_drops_nothing(registry: Registry, copies: Copies) -> None:
    await push(registry, "a", "one")
    await push(registry, "a", "one")
    assert (copies.dropped, copies.forgotten) == ([], [])


async def test_what_another_name_points_at_stays(registry: Registry, copies: Copies) -> None:
    await push(registry, "a", "one")
    await push(registry, "b", "one")
    await push(registry, "a", "two")
    await registry.delete(TENANT, "a")
    assert (copies.dropped, copies.forgotten) == ([TWO], [TWO])
    await registry.delete(TENANT, "b")
    assert (copies.dropped, copies.forgotten) == ([TWO, ONE], [TWO, ONE])


async def test_a_running_request_holds_it_until_its_end(registry: Registry, copies: Copies) -> None:
    await push(registry, "a", "one")
    with registry.resolve(TENANT, "a"):
        await registry.delete(TENANT, "a")
        assert (copies.dropped, copies.forgotten) == ([ONE], [])
    async with asyncio.timeout(5):
        while not copies.forgotten:  # noqa: ASYNC110 -- the collection runs on a thread of its own
            await asyncio.sleep(0.005)
    assert copies.forgotten == [ONE]

"""Publishing with a certificate: replayed before anything is visible, and what becomes of the upload when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.certificate.replay import Replay
from loramux_adapters.errors import AdapterNotFound, CertificateRefused
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import ReplayRecord
from loramux_server.errors import Overloaded
from loramux_server.registry import Registry
from support.servers import FakeStates
from support.stores import BASE, TENANT, content, digest_of, manifest_of, quick_store, read_facts

ID = "upload-0001"
PLAIN = content("one")
DIGEST = digest_of(PLAIN)
FILES = {**PLAIN, CERTIFICATE_FILE: b"the certificate"}
HOLDS = Replay(1e-6, 1e-12, 1e-3, "float32", "probe 0")
PARTS = Replay(0.5, 0.1, 1e-3, "float32", "probe 1 after 2 tokens: token 3 has -1.0000, trained -2.0000")


class Caches(FakeStates):
    """Notes what is lent, offered and evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.lent: list[str] = []
        self.evicted: list[str] = []
        self.offered: list[str] = []

    @contextmanager
    def lend(self, weights: Weights) -> Iterator[None]:
        self.lent.append(weights.spec.digest)
        try:
            yield
        finally:
            self.lent.remove(weights.spec.digest)

    def offer(self, weights: Weights) -> None:
        self.offered.append(weights.spec.digest)

    def evict(self, digest: str) -> None:
        self.evicted.append(digest)


class Server:
    """A registry whose replays come out as a test says; `asked` are (tenant, digest, certificate)."""

    def __init__(self, root: Path) -> None:
        self.outcome: Replay | Exception = HOLDS
        self.asked: list[tuple[str, str, bytes]] = []
        self.during: Callable[[], None] = lambda: None
        self.caches = Caches()
        self.store: LocalStore = quick_store(root)
        self.registry = Registry(self.store, read_facts, BASE, self.caches, replay=self.replay)

    async def replay(self, tenant: str, spec: AdapterSpec, certificate: bytes) -> Replay:
        assert self.caches.lent == [spec.digest]  # requests can load it
        self.asked.append((tenant, spec.digest, certificate))
        await asyncio.sleep(0)
        self.during()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def upload(self, name: str, files: dict[str, bytes], upload_id: str = ID) -> None:
        progress = await self.registry.begin_upload(TENANT, upload_id, manifest_of(name, files))
        for entry in progress.files:
            rest = files[entry.file][entry.received :]
            if rest:
                await self.registry.write_chunk(TENANT, upload_id, entry.file, entry.received, rest)

    async def push(self, name: str, files: dict[str, bytes], upload_id: str = ID) -> None:
        await self.upload(name, files, upload_id)
        await self.registry.publish(TENANT, upload_id)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.registry.close()


@pytest.mark.asyncio
async def test_what_holds_is_published_with_its_replay(server: Server, tmp_path: Path) -> None:
    def invisible() -> None:
        with pytest.raises(AdapterNotFound):
            server.registry.resolve(TENANT, "one")

    server.during = invisible
    await server.push("one", FILES)
    assert server.asked == [(TENANT, DIGEST, b"the certificate")]
    assert (server.caches.lent, server.caches.offered, server.caches.evicted) == ([], [DIGEST], [])
    expected = {BASE: ReplayRecord(1e-6, 1e-12, 1e-3, "float32")}
    assert (await server.registry.get(TENANT, "one")).replays == expected
    assert server.store.certificate(DIGEST) == b"the certificate"
    server.registry.close()
    with quick_store(tmp_path) as store:  # and after a restart
        assert store.get(TENANT, "one").replays == expected
        assert store.certificate(DIGEST) == b"the certificate"


@pytest.mark.asyncio
@pytest.mark.parametrize("outcome", [PARTS, CertificateRefused("of another base", subject=CERTIFICATE_FILE)])
async def test_what_parts_is_discarded_and_leaves_nothing(server: Server, outcome: Replay | Exception) -> None:
    server.outcome = outcome
    with pytest.raises(CertificateRefused):
        await server.push("one", FILES)
    assert (server.caches.lent, server.caches.offered, server.caches.evicted) == ([], [], [DIGEST])
    for look in (server.registry.get(TENANT, "one"), server.registry.query_upload(TENANT, ID)):
        with pytest.raises(AdapterNotFound):
            await look


@pytest.mark.asyncio
async def test_a_server_that_has_no_time_now_keeps_the_bytes(server: Server) -> None:
    server.outcome = Overloaded(1.0)
    with pytest.raises(Overloaded):
        await server.push("one", FILES)
    assert server.caches.evicted == [DIGEST]
    progress = await server.registry.query_upload(TENANT, ID)
    assert progress.complete
    server.outcome = HOLDS
    await server.push("one", FILES)
    assert (await server.registry.get(TENANT, "one")).replays


@pytest.mark.asyncio
async def test_a_certificate_comes_to_content_that_had_none(server: Server) -> None:
    """The first files stay as they are; one that is refused changes nothing of what is served, nor of where it is."""
    await server.push("one", PLAIN)
    assert not (await server.registry.get(TENANT, "one")).replays
    assert server.store.certificate(DIGEST) is None
    server.outcome = PARTS
    with pytest.raises(CertificateRefused):
        await server.push("one", FILES)
    assert server.caches.evicted == []
    assert server.store.certificate(DIGEST) is None
    server.outcome = HOLDS
    await server.push("two", FILES)
    assert server.store.certificate(DIGEST) == b"the certificate"
    for name in ("one", "two"):
        assert (await server.registry.get(TENANT, name)).replays
    with await server.registry.download(TENANT, "one") as download:
        files = {entry.file: entry.size for entry in download.files}
    assert files == {name: len(data) for name, data in FILES.items()}
    await server.push("three", PLAIN)  # without one: what is known of the content stays known
    assert (await server.registry.get(TENANT, "three")).replays


@pytest.mark.asyncio
async def test_a_server_without_an_engine_takes_no_certificate(tmp_path: Path) -> None:
    registry = Registry(quick_store(tmp_path), read_facts, BASE, FakeStates())
    try:
        await registry.begin_upload(TENANT, ID, manifest_of("one", FILES))
        for name, data in FILES.items():
            await registry.write_chunk(TENANT, ID, name, 0, data)
        with pytest.raises(CertificateRefused, match="replays no certificates"):
            await registry.publish(TENANT, ID)
    finally:
        registry.close()

"""The registry: references, holds, the publish flow, downloads; over the real store."""

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    QuotaExceeded,
    StoreUnavailable,
)
from loramux_adapters.store.records import AdapterUpdate, Health, Quotas
from loramux_server.registry import Registry, split_reference
from support.servers import FakeStates
from support.stores import (
    BASE,
    CONFIG,
    MODEL,
    TENANT,
    FakeWeights,
    Files,
    blob_files,
    content,
    digest_of,
    entries_of,
    manifest_of,
    quick_store,
    read_facts,
)

FILES = content("one")
DIGEST = digest_of(FILES)
ID = "upload-0001"


class Reader:
    """A format reader that refuses on demand."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.consents: list[bool] = []

    def __call__(self, files: Mapping[str, Path], *, allow_base_mismatch: bool) -> FakeWeights:
        self.consents.append(allow_base_mismatch)
        if self.error:
            raise self.error
        return read_facts(files, allow_base_mismatch=allow_base_mismatch)


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def registry(tmp_path: Path, reader: Reader) -> Iterator[Registry]:
    registry = Registry(quick_store(tmp_path, Quotas(max_adapters=3, keep_versions=2)), reader, BASE, FakeStates())
    yield registry
    registry.close()


async def upload(registry: Registry, name: str, files: Files, upload_id: str = ID, **options: object) -> None:
    """Everything but the commit."""
    progress = await registry.begin_upload(TENANT, upload_id, manifest_of(name, files, **options))
    for entry in progress.files:
        await registry.write_chunk(TENANT, upload_id, entry.file, entry.received, files[entry.file][entry.received :])


async def push(registry: Registry, name: str, files: Files) -> None:
    await upload(registry, name, files)
    await registry.publish(TENANT, ID)


async def until_empty(root: Path) -> None:
    """Wait for a collection in the background."""
    for _ in range(500):
        if not blob_files(root):
            return
        await asyncio.sleep(0.01)
    pytest.fail("the bytes were not collected")


@pytest.mark.asyncio
async def test_name_alias_and_version_resolve_to_the_same_thing(registry: Registry) -> None:
    await push(registry, "one", FILES)
    await registry.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    for reference in ("one", "uno", f"one@{DIGEST}", f"one@{DIGEST[:8]}", f"uno@{DIGEST[:9]}"):
        with registry.resolve(TENANT, reference) as resolved:
            assert (resolved.tenant, resolved.name, resolved.digest) == (TENANT, "one", DIGEST)
            assert resolved.spec.ranks == {"layers.0.q_proj": 8, "layers.0.v_proj": 4}
        assert (await registry.get(TENANT, reference)).digest == DIGEST


@pytest.mark.asyncio
@pytest.mark.parametrize("reference", ["nobody", "one@00000000", f"nobody@{DIGEST}", "begun"])
async def test_what_is_not_there_is_not_found_nor_is_an_unfinished_upload(registry: Registry, reference: str) -> None:
    await push(registry, "one", FILES)
    await upload(registry, "begun", FILES)
    with pytest.raises(AdapterNotFound):
        registry.resolve(TENANT, reference)
    with pytest.raises(AdapterNotFound):
        registry.resolve("another-tenant", "one")


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "@",
        "one@",
        "one@1234567",
        "one@ABCDEF01",
        "../x",
        "a/b",
        "a,b",
        "a\0b",
        "a" * 300,
        "\u202eone",
        "one@one@one",
    ],
)
def test_malformed_references_are_refused(registry: Registry, reference: str) -> None:
    with pytest.raises(AdapterInvalid):
        registry.resolve(TENANT, reference)


def test_a_reference_splits_at_the_sign() -> None:
    assert split_reference("name") == ("name", "")
    assert split_reference("name@0123abcd") == ("name", "0123abcd")


@pytest.mark.asyncio
async def test_a_request_keeps_its_version_when_the_name_is_replaced_or_deleted(
    registry: Registry, tmp_path: Path
) -> None:
    await push(registry, "one", FILES)
    resolved = registry.resolve(TENANT, "one")
    await push(registry, "one", content("two"))
    with registry.resolve(TENANT, "one") as newer:
        assert newer.digest == digest_of(content("two"))
    await registry.delete(TENANT, "one")
    with pytest.raises(AdapterNotFound):
        registry.resolve(TENANT, "one")
    assert blob_files(tmp_path) == {entry.sha256 for entry in entries_of(FILES)}
    resolved.release()
    resolved.release()
    await until_empty(tmp_path)


@pytest.mark.asyncio
async def test_a_release_is_idempotent_and_gives_back_only_its_own_hold(registry: Registry, tmp_path: Path) -> None:
    await push(registry, "one", FILES)
    first, second = registry.resolve(TENANT, "one"), registry.resolve(TENANT, "one")
    await registry.delete(TENANT, "one")
    for _ in range(3):
        first.release()
    await asyncio.sleep(0.05)
    assert len(blob_files(tmp_path)) == 2
    second.release()
    await until_empty(tmp_path)


@pytest.mark.asyncio
async def test_invalid_files_end_the_upload(registry: Registry, reader: Reader, tmp_path: Path) -> None:
    reader.error = AdapterInvalid("not safetensors", subject=MODEL)
    await upload(registry, "one", FILES)
    with pytest.raises(AdapterInvalid, match="not safetensors"):
        await registry.publish(TENANT, ID)
    with pytest.raises(AdapterNotFound):
        await registry.query_upload(TENANT, ID)
    with pytest.raises(AdapterNotFound):
        registry.resolve(TENANT, "one")
    assert blob_files(tmp_path) == set()


@pytest.mark.asyncio
async def test_another_base_needs_consent_and_no_byte_again(registry: Registry, reader: Reader) -> None:
    reader.error = AdapterIncompatible("made for another base")
    await upload(registry, "one", FILES)
    with pytest.raises(AdapterIncompatible):
        await registry.publish(TENANT, ID)
    reader.error = None
    progress = await registry.begin_upload(TENANT, ID, manifest_of("one", FILES, allow_base_mismatch=True))
    assert progress.complete
    published = await registry.publish(TENANT, ID)
    assert published.record.spec.base_mismatch
    assert reader.consents == [False, True]


@pytest.mark.asyncio
async def test_a_wrong_hash_never_reaches_the_reader(registry: Registry, reader: Reader) -> None:
    await registry.begin_upload(TENANT, ID, manifest_of("one", FILES))
    await registry.write_chunk(TENANT, ID, CONFIG, 0, FILES[CONFIG])
    await registry.write_chunk(TENANT, ID, MODEL, 0, bytes(len(FILES[MODEL])))
    with pytest.raises(AdapterInvalid, match="sha256"):
        await registry.publish(TENANT, ID)
    assert reader.consents == []
    await upload(registry, "one", FILES)
    assert (await registry.publish(TENANT, ID)).created


@pytest.mark.asyncio
async def test_files_that_cannot_be_read_keep_the_upload(registry: Registry, reader: Reader) -> None:
    reader.error = OSError(5, "Input/output error")
    await upload(registry, "one", FILES)
    with pytest.raises(StoreUnavailable):
        await registry.publish(TENANT, ID)
    reader.error = None
    assert (await registry.publish(TENANT, ID)).created
    assert not (await registry.list(TENANT)).next_page_token


@pytest.mark.asyncio
async def test_uploads_that_race_for_the_last_place(registry: Registry) -> None:
    for number in range(2):
        await push(registry, f"a{number}", content(f"a{number}"))
    ids = [f"upload-{number:04}" for number in range(4)]
    for upload_id in ids:
        await upload(registry, upload_id, content(upload_id), upload_id)
    outcomes = await asyncio.gather(*(registry.publish(TENANT, i) for i in ids), return_exceptions=True)
    assert sum(isinstance(outcome, QuotaExceeded) for outcome in outcomes) == 3
    assert len((await registry.list(TENANT)).records) == 3


@pytest.mark.asyncio
async def test_a_publish_whose_caller_went_away_still_ends_whole(registry: Registry) -> None:
    await upload(registry, "one", FILES)
    task = asyncio.create_task(registry.publish(TENANT, ID))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(500):
        if (await registry.list(TENANT)).records:
            break
        await asyncio.sleep(0.01)
    with registry.resolve(TENANT, "one") as resolved:
        assert resolved.digest == DIGEST


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
async def test_a_download_gives_the_first_bytes_back_even_while_it_is_deleted(
    registry: Registry, tmp_path: Path, size: int
) -> None:
    files = content("small", 100) if size == 1 else FILES
    await push(registry, "one", files)
    received: dict[str, bytearray] = {file: bytearray() for file in files}
    with await registry.download(TENANT, "one") as download:
        assert (download.digest, set(download.files)) == (digest_of(files), set(entries_of(files)))
        await registry.delete(TENANT, "one")
        async for chunk in download.chunks(size):
            assert len(received[chunk.file]) == chunk.offset
            assert len(chunk.data) <= size
            received[chunk.file] += chunk.data
    assert received == files
    await until_empty(tmp_path)


@pytest.mark.asyncio
async def test_a_download_of_a_file_cut_short_says_so(registry: Registry, tmp_path: Path) -> None:
    await push(registry, "one", FILES)
    sha256 = next(entry.sha256 for entry in entries_of(FILES) if entry.file == MODEL)
    blob = tmp_path / "blobs" / sha256[:2] / sha256
    blob.write_bytes(blob.read_bytes()[:100])
    with await registry.download(TENANT, "one") as download:
        with pytest.raises(AdapterCorrupt):
            [chunk async for chunk in download.chunks()]
        blob.unlink()
        with pytest.raises(AdapterCorrupt):
            [chunk async for chunk in download.chunks()]
    with pytest.raises(AdapterNotFound):
        await registry.download(TENANT, "nobody")


@pytest.mark.asyncio
async def test_a_download_that_fails_at_its_start_holds_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(registry, "one", FILES)

    def fail(*_: object) -> None:
        raise StoreUnavailable("the store cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(registry._store, "entries", fail)
        with pytest.raises(StoreUnavailable):
            await registry.download(TENANT, "one")
    await registry.delete(TENANT, "one")
    await until_empty(tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
async def test_what_a_download_finds_damaged_is_marked(registry: Registry, tmp_path: Path, harm: str) -> None:
    await push(registry, "one", FILES)
    sha256 = next(entry.sha256 for entry in entries_of(FILES) if entry.file == MODEL)
    blob = tmp_path / "blobs" / sha256[:2] / sha256
    data = blob.read_bytes()
    with await registry.download(TENANT, "one") as download:
        if harm == "remove":
            blob.unlink()
        else:
            blob.write_bytes(data[:100] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(AdapterCorrupt):
            [chunk async for chunk in download.chunks()]
    assert (await registry.get(TENANT, "one")).health is Health.CORRUPT
    with pytest.raises(AdapterCorrupt):
        registry.resolve(TENANT, "one")
    await push(registry, "one", FILES)
    assert (await registry.get(TENANT, "one")).health is Health.OK


@pytest.mark.asyncio
async def test_resolving_is_fast_enough_for_the_event_loop(registry: Registry) -> None:
    await push(registry, "one", FILES)
    seconds = []
    for _ in range(500):
        start = time.thread_time()
        registry.resolve(TENANT, "one").release()
        seconds.append(time.thread_time() - start)
    assert statistics.median(seconds) < 0.001


@pytest.mark.asyncio
async def test_a_release_after_the_close_is_harmless(tmp_path: Path) -> None:
    registry = Registry(quick_store(tmp_path), read_facts, BASE, FakeStates())
    await push(registry, "one", FILES)
    resolved = registry.resolve(TENANT, "one")
    await registry.delete(TENANT, "one")
    registry.close()
    registry.close()
    resolved.release()
    assert len(blob_files(tmp_path)) == 2
    quick_store(tmp_path).close()
    assert blob_files(tmp_path) == set()


@pytest.mark.asyncio
async def test_texts_that_take_long_to_judge_hold_up_no_other_publish(tmp_path: Path, reader: Reader) -> None:
    judging, go = threading.Event(), threading.Event()

    def check(files: Mapping[str, Path]) -> None:
        judging.set()
        go.wait(60)
        raise AdapterInvalid("no tokenizer", subject="tokenizer.json")

    registry = Registry(quick_store(tmp_path), reader, BASE, FakeStates(), check_texts=check)
    await upload(registry, "hostile", {**content("two"), "tokenizer.json": b"{}"}, "upload-0002")
    hostile = asyncio.create_task(registry.publish(TENANT, "upload-0002"))
    assert await asyncio.to_thread(judging.wait, 30)
    await upload(registry, "plain", FILES)
    published = await asyncio.wait_for(registry.publish(TENANT, ID), 30)
    assert (published.record.id.name, hostile.done()) == ("plain", False)
    go.set()
    with pytest.raises(AdapterInvalid, match="no tokenizer"):
        await hostile
    with pytest.raises(AdapterNotFound):  # it is discarded: no resume can mend it
        await registry.query_upload(TENANT, "upload-0002")
    assert len(reader.consents) == 1
    registry.close()

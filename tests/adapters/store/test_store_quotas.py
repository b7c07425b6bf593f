"""Quotas, and uploads that race for the last place."""

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, QuotaExceeded, UploadOffset
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import Published, Quotas
from support.stores import (
    BASE,
    TENANT,
    Files,
    blob_files,
    content,
    digest_of,
    manifest_of,
    put,
    quick_store,
    send,
    spec_of,
    stage,
    stored,
)


def race(*calls: Callable[[], Published]) -> list[Published | BaseException]:
    """Run all calls at once; what each returned or raised."""
    results: list[Published | BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Published]) -> None:
        barrier.wait()
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def publishing(store: LocalStore, upload_id: str, files: Files) -> Callable[[], Published]:
    return lambda: store.publish(TENANT, upload_id, spec_of(files), BASE)


def test_one_too_many_is_refused_at_the_begin_and_a_replace_is_not(tmp_path: Path) -> None:
    with LocalStore(tmp_path, Quotas(max_adapters=2)) as store:
        put(store, "a", content("a"))
        put(store, "b", content("b"))
        with pytest.raises(QuotaExceeded, match="all 2 adapters"):
            store.begin_upload(TENANT, "upload-0001", manifest_of("c", content("c")))
        assert put(store, "a", content("a2")).created
        put(store, "c", content("c"), tenant="other")
        store.delete(TENANT, "b")
        assert put(store, "c", content("c")).created


@pytest.mark.parametrize("quotas", [Quotas(max_adapters=3), Quotas(max_bytes=3 * 5200)], ids=["count", "bytes"])
def test_of_two_uploads_that_race_for_the_last_place_exactly_one_wins(tmp_path: Path, quotas: Quotas) -> None:
    with LocalStore(tmp_path, quotas) as store:
        for name in ("a", "b"):
            put(store, name, content(name))
        for turn in range(5):
            names = [f"x{turn}", f"y{turn}"]
            ids = {name: stage(store, name, content(name)) for name in names}
            results = race(*(publishing(store, ids[name], content(name)) for name in names))
            won = [result for result in results if isinstance(result, Published)]
            lost = [result for result in results if isinstance(result, QuotaExceeded)]
            assert (len(won), len(lost)) == (1, 1)
            assert len(store.list(TENANT).records) == 3
            assert len(blob_files(tmp_path)) == 6
            loser = next(name for name in names if name != won[0].record.id.name)
            with pytest.raises(AdapterNotFound):
                store.get(TENANT, loser)
            # With room made, the loser's upload needs no byte again.
            store.delete(TENANT, won[0].record.id.name)
            assert store.publish(TENANT, ids[loser], spec_of(content(loser)), BASE).created
            store.delete(TENANT, loser)


def test_the_same_name_uploaded_twice_at_once_ends_as_one_of_the_two(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        for turn in range(5):
            both = [content(f"x{turn}"), content(f"y{turn}")]
            ids = [stage(store, "one", files) for files in both]
            results = race(*(publishing(store, *pair) for pair in zip(ids, both, strict=True)))
            assert all(isinstance(result, Published) and result.created for result in results)
            current = store.get(TENANT, "one").digest
            assert current in {digest_of(files) for files in both}
            for files in both:
                assert stored(store, store.get(TENANT, "one", digest_of(files)[:12]).digest) == files


def test_one_upload_committed_twice_at_once_is_published_once(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        files = content("one")
        upload_id = stage(store, "one", files)
        results = race(*[publishing(store, upload_id, files)] * 2)
        assert sorted(type(result).__name__ for result in results) == ["AdapterNotFound", "Published"]


def test_superseded_versions_give_way_before_an_upload_is_refused(tmp_path: Path) -> None:
    size = sum(map(len, content("v0").values()))
    with LocalStore(tmp_path, Quotas(max_bytes=3 * size)) as store:
        for number in range(3):
            put(store, "one", content(f"v{number}"))
        put(store, "two", content("w0"))
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "one", digest_of(content("v0"))[:8])
        put(store, "three", content("x0"))
        assert store.get(TENANT, "one").digest == digest_of(content("v2"))
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "one", digest_of(content("v1"))[:8])
        with pytest.raises(QuotaExceeded, match="bytes"):
            put(store, "four", content("y0"))
        assert len(blob_files(tmp_path)) == 6
        # Content that is there already takes no room.
        assert put(store, "four", content("x0")).created


def test_an_upload_that_is_refused_forgets_no_old_version(tmp_path: Path) -> None:
    size = sum(map(len, content("v0").values()))
    with LocalStore(tmp_path, Quotas(max_bytes=2 * size)) as store:
        put(store, "one", content("v0"))
        put(store, "one", content("v1"))
        with pytest.raises(QuotaExceeded):
            put(store, "two", content("w0", 15_000))
        assert stored(store, store.get(TENANT, "one", digest_of(content("v0"))[:8]).digest) == content("v0")


def test_bytes_that_only_a_running_request_holds_are_not_counted(tmp_path: Path) -> None:
    size = sum(map(len, content("v0").values()))
    with LocalStore(tmp_path, Quotas(max_bytes=size)) as store:
        put(store, "one", content("v0"))
        store.acquire(TENANT, "one")
        store.delete(TENANT, "one")
        assert put(store, "two", content("v1")).created
        assert stored(store, digest_of(content("v0"))) == content("v0")


def test_quotas_lowered_later_only_refuse_growth(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        for name in ("a", "b"):
            put(store, name, content(name))
    with LocalStore(tmp_path, Quotas(max_adapters=1, max_bytes=1)) as store:
        assert not put(store, "a", content("a")).created
        assert put(store, "a", content("b")).created
        with pytest.raises(QuotaExceeded):
            put(store, "c", content("a"))


def test_two_streams_of_one_upload_id_never_mix_their_bytes(tmp_path: Path) -> None:
    """Callers that begin, send, discard and publish under one id at once: each is told what happened, or wins."""
    store = quick_store(tmp_path, Quotas(keep_versions=1))
    contents = [content("left"), content("right")]
    published: Counter[str] = Counter()

    def work(files: Files, discard: bool) -> Published:
        last: Published | None = None
        for turn in range(40):
            try:
                store.begin_upload(TENANT, "upload-0001", manifest_of("one", files))
                send(store, "upload-0001", files)
                if discard and turn % 3 == 0:
                    store.discard_upload(TENANT, "upload-0001")
                store.staged_files(TENANT, "upload-0001")
                last = store.publish(TENANT, "upload-0001", spec_of(files), BASE)
                published[last.record.digest] += 1
            except (AdapterConflict, AdapterInvalid, AdapterNotFound, UploadOffset):
                continue
        return last or put(store, "one", files)

    with store:
        results = race(*(partial(work, files, discard) for files in contents for discard in (True, False)))
        assert all(isinstance(result, Published) for result in results), results
        assert published.total() > 10
        current = store.get(TENANT, "one").digest
        assert stored(store, current) in contents
        assert len(blob_files(tmp_path)) == 2
        store.discard_upload(TENANT, "upload-0001")
        assert not list((tmp_path / "uploads" / TENANT).iterdir())


def test_a_certificate_that_comes_later_is_held_against_the_bytes_too(tmp_path: Path) -> None:
    plain = content("a")
    certified = {**plain, CERTIFICATE_FILE: b"c" * 1000}
    kept = sum(map(len, plain.values()))
    with LocalStore(tmp_path, Quotas(max_bytes=kept + 999)) as store:
        put(store, "a", plain)
        with pytest.raises(QuotaExceeded, match="bytes of adapters would be more than"):
            put(store, "a", certified)
        assert store.usage() == (1, kept)
        assert store.certificate(digest_of(plain)) is None
        put(store, "a", plain)
    with LocalStore(tmp_path, Quotas(max_bytes=kept + 1000)) as store:
        put(store, "a", certified)
        assert store.usage() == (1, kept + 1000)

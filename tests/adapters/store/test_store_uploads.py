"""Uploads: what may be begun, what a chunk must be, what a restart finds again."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from loramux_adapters.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    QuotaExceeded,
    UploadOffset,
)
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import FileEntry, Quotas, UploadManifest
from support.stores import BASE, CONFIG, MODEL, TENANT, content, entries_of, manifest_of, put, send, spec_of, stored

FILES = content("one")
ID = "upload-0001"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path) as store:
        yield store


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a,b", "a\0b", "a" * 300, "a" * 65, "abc\u202edef", ".hidden", "-x", "a\n", "ä", "a b"]
)
def test_a_name_that_is_not_plain_is_refused_without_reordering_marks_in_the_message(
    store: LocalStore, name: str
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        store.begin_upload(TENANT, ID, manifest_of(name, FILES))
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 300
    for call in (store.acquire, store.get, store.delete):
        with pytest.raises(AdapterInvalid):
            call(TENANT, name)
    with pytest.raises(AdapterInvalid):
        store.begin_upload(name, ID, manifest_of("fine", FILES))


@pytest.mark.parametrize("upload_id", ["short", "x" * 65, "../../etc", "has space", "dots.dots.dots", "", "abcdefg\0"])
def test_an_upload_id_that_is_not_plain_is_refused(store: LocalStore, upload_id: str) -> None:
    with pytest.raises(AdapterInvalid):
        store.begin_upload(TENANT, upload_id, manifest_of("fine", FILES))
    with pytest.raises(AdapterInvalid):
        store.query_upload(TENANT, upload_id)


SHA = "0" * 64


@pytest.mark.parametrize(
    "files",
    [
        (),
        (FileEntry("evil.bin", 1, SHA),),
        (FileEntry("../adapter_config.json", 1, SHA),),
        (FileEntry("upload.json", 1, SHA),),
        (FileEntry(CONFIG, 1, SHA), FileEntry(CONFIG, 1, SHA)),
        (FileEntry(CONFIG, (1 << 20) + 1, SHA),),
        (FileEntry("loramux.json", (1 << 20) + 1, SHA),),
        (FileEntry(MODEL, 0, SHA),),
        (FileEntry(MODEL, -1, SHA),),
        (FileEntry(MODEL, 1, "0" * 63),),
        (FileEntry(MODEL, 1, "A" * 64),),
        (FileEntry(MODEL, 1, "../" + "0" * 61),),
    ],
)
def test_a_manifest_of_other_files_sizes_or_hashes_is_refused(store: LocalStore, files: tuple[FileEntry, ...]) -> None:
    with pytest.raises(AdapterInvalid):
        store.begin_upload(TENANT, ID, UploadManifest("fine", files))
    with pytest.raises(AdapterNotFound):
        store.query_upload(TENANT, ID)


@pytest.mark.parametrize(
    "labels",
    [{"": "x"}, {"a b": "x"}, {"k" * 64: "x"}, {"k": "v" * 257}, {"k": "new\nline"}, {f"k{i}": "" for i in range(65)}],
)
def test_labels_are_bounded(store: LocalStore, labels: dict[str, str]) -> None:
    with pytest.raises(AdapterInvalid):
        store.begin_upload(TENANT, ID, manifest_of("fine", FILES, labels=labels))


def test_an_upload_over_the_limit_is_refused_before_a_byte_is_sent(tmp_path: Path) -> None:
    with LocalStore(tmp_path, Quotas(max_upload_bytes=100)) as store, pytest.raises(QuotaExceeded):
        store.begin_upload(TENANT, ID, manifest_of("big", FILES))


@pytest.mark.parametrize("offset", [0, 99, 101, 2000])
def test_gap_and_overlap_say_where_to_continue(store: LocalStore, offset: int) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    assert store.write_chunk(TENANT, ID, MODEL, 0, FILES[MODEL][:100]) == 100
    with pytest.raises(UploadOffset) as caught:
        store.write_chunk(TENANT, ID, MODEL, offset, b"x")
    assert (caught.value.received, caught.value.subject) == (100, MODEL)
    assert store.write_chunk(TENANT, ID, MODEL, 100, FILES[MODEL][100:]) == len(FILES[MODEL])


def test_bytes_beyond_the_declared_size_are_refused_and_change_nothing(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    with pytest.raises(AdapterInvalid, match=CONFIG):
        store.write_chunk(TENANT, ID, CONFIG, 0, FILES[CONFIG] + b"x")
    with pytest.raises(AdapterInvalid, match="no file"):
        store.write_chunk(TENANT, ID, "loramux.json", 0, b"x")
    send(store, ID, FILES)
    with pytest.raises(AdapterInvalid, match=MODEL):
        store.write_chunk(TENANT, ID, MODEL, len(FILES[MODEL]), b"x")
    assert store.query_upload(TENANT, ID).complete


def test_a_commit_with_missing_bytes_names_the_file_and_can_be_completed(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    store.write_chunk(TENANT, ID, CONFIG, 0, FILES[CONFIG])
    store.write_chunk(TENANT, ID, MODEL, 0, FILES[MODEL][:-1])
    with pytest.raises(AdapterInvalid, match=f"{MODEL} has 4999 of its 5000 bytes"):
        store.staged_files(TENANT, ID)
    send(store, ID, FILES)
    assert set(store.staged_files(TENANT, ID).files) == {CONFIG, MODEL}


def test_a_file_with_a_wrong_hash_starts_again_alone(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    wrong = bytes([FILES[MODEL][0] ^ 1]) + FILES[MODEL][1:]
    send(store, ID, {**FILES, MODEL: wrong})
    with pytest.raises(AdapterInvalid) as caught:
        store.staged_files(TENANT, ID)
    assert caught.value.subject == MODEL
    received = {progress.file: progress.received for progress in store.query_upload(TENANT, ID).files}
    assert received == {CONFIG: len(FILES[CONFIG]), MODEL: 0}
    send(store, ID, FILES)
    store.staged_files(TENANT, ID)
    assert store.publish(TENANT, ID, spec_of(FILES), BASE).created


def test_publish_wants_the_very_upload_that_was_staged(store: LocalStore) -> None:
    with pytest.raises(AdapterNotFound):
        store.publish(TENANT, ID, spec_of(FILES), BASE)
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    send(store, ID, FILES)
    with pytest.raises(AdapterConflict):
        store.publish(TENANT, ID, spec_of(FILES), BASE)
    with pytest.raises(AdapterNotFound):
        store.get(TENANT, "one")


def test_an_unfinished_upload_is_not_an_adapter(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    send(store, ID, FILES)
    for call in (store.get, store.acquire, store.delete):
        with pytest.raises(AdapterNotFound):
            call(TENANT, "one")
    assert store.list(TENANT).records == ()


def test_the_same_begin_resumes_and_takes_the_new_labels_and_consent(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES, labels={"a": "1"}))
    store.write_chunk(TENANT, ID, MODEL, 0, FILES[MODEL][:10])
    again = store.begin_upload(TENANT, ID, manifest_of("one", FILES, labels={"b": "2"}, allow_base_mismatch=True))
    assert [progress.received for progress in again.files] == [0, 10]
    send(store, ID, FILES)
    staged = store.staged_files(TENANT, ID)
    assert staged.manifest.allow_base_mismatch
    assert store.publish(TENANT, ID, spec_of(FILES), BASE).record.labels == {"b": "2"}


def test_the_id_of_an_open_upload_cannot_mean_something_else(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    with pytest.raises(AdapterConflict):
        store.begin_upload(TENANT, ID, manifest_of("two", FILES))
    with pytest.raises(AdapterConflict):
        store.begin_upload(TENANT, ID, manifest_of("one", content("other")))
    store.begin_upload("another", ID, manifest_of("two", FILES))  # ids belong to tenants


def test_discard_forgets_everything_and_the_id_is_free(store: LocalStore, tmp_path: Path) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    send(store, ID, FILES)
    store.discard_upload(TENANT, ID)
    store.discard_upload(TENANT, ID)
    assert not list((tmp_path / "uploads" / TENANT).iterdir())
    with pytest.raises(AdapterNotFound):
        store.write_chunk(TENANT, ID, MODEL, 0, b"x")
    assert not store.begin_upload(TENANT, ID, manifest_of("two", content("two"))).files[0].received


def test_an_upload_continues_after_a_restart_with_what_is_on_disk(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        store.begin_upload(TENANT, ID, manifest_of("one", FILES, labels={"k": "v"}))
        store.write_chunk(TENANT, ID, MODEL, 0, FILES[MODEL][:3000])
    with LocalStore(tmp_path) as store:
        assert [progress.received for progress in store.query_upload(TENANT, ID).files] == [0, 3000]
        send(store, ID, FILES)
        store.staged_files(TENANT, ID)
        published = store.publish(TENANT, ID, spec_of(FILES), BASE)
        assert published.record.labels == {"k": "v"}
        assert stored(store, published.record.digest) == FILES


def test_what_lies_shorter_or_longer_on_disk_is_what_counts(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        store.begin_upload(TENANT, ID, manifest_of("one", FILES))
        store.write_chunk(TENANT, ID, MODEL, 0, FILES[MODEL][:3000])
    part = tmp_path / "uploads" / TENANT / ID / MODEL
    os.truncate(part, 1234)
    with LocalStore(tmp_path) as store:
        assert store.query_upload(TENANT, ID).files[1].received == 1234
    part.write_bytes(FILES[MODEL] + b"tail")
    with LocalStore(tmp_path) as store:
        assert store.query_upload(TENANT, ID).files[1].received == len(FILES[MODEL])
        send(store, ID, FILES)
        assert store.staged_files(TENANT, ID).files[MODEL].read_bytes() == FILES[MODEL]


def test_open_uploads_are_bounded_and_idle_ones_make_room(tmp_path: Path) -> None:
    now = [time.time()]
    quotas = Quotas(max_open_uploads=2, upload_ttl_seconds=3600)
    with LocalStore(tmp_path, quotas, clock=lambda: now[0]) as store:
        store.begin_upload(TENANT, "first-upload", manifest_of("a", FILES))
        store.begin_upload(TENANT, "second-upload", manifest_of("b", FILES))
        store.begin_upload("another", "third-upload", manifest_of("c", FILES))
        with pytest.raises(QuotaExceeded):
            store.begin_upload(TENANT, "third-upload", manifest_of("c", FILES))
        store.begin_upload(TENANT, "first-upload", manifest_of("a", FILES))  # a resume needs no room
        now[0] += 3700
        store.begin_upload(TENANT, "third-upload", manifest_of("c", FILES))
        with pytest.raises(AdapterNotFound):
            store.write_chunk(TENANT, "first-upload", CONFIG, 0, FILES[CONFIG])


def test_start_sweeps_idle_and_torn_uploads_and_keeps_the_others(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        for upload_id in ("idle-upload", "young-upload"):
            store.begin_upload(TENANT, upload_id, manifest_of("a", FILES))
    uploads = tmp_path / "uploads" / TENANT
    torn = uploads / "torn-upload"
    torn.mkdir()
    (torn / MODEL).write_bytes(b"half")
    (torn / "upload.json.tmp").write_bytes(b'{"name"')
    (uploads / "strange-file").write_bytes(b"x")
    unreadable = uploads / "unreadable-upload"
    unreadable.mkdir()
    (unreadable / "upload.json").write_bytes(b'["not", "ours"]')
    yesterday = time.time() - 90_000
    for path in (*(uploads / "idle-upload").iterdir(), uploads / "idle-upload"):
        os.utime(path, (yesterday, yesterday))
    with LocalStore(tmp_path) as store:
        assert [path.name for path in uploads.iterdir()] == ["young-upload"]
        store.query_upload(TENANT, "young-upload")


def test_a_published_upload_is_gone_and_repeating_it_is_idempotent(store: LocalStore, tmp_path: Path) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    send(store, ID, FILES)
    store.staged_files(TENANT, ID)
    store.publish(TENANT, ID, spec_of(FILES), BASE)
    assert not list((tmp_path / "uploads" / TENANT).iterdir())
    with pytest.raises(AdapterNotFound):
        store.write_chunk(TENANT, ID, MODEL, 5000, b"after the commit")
    assert not put(store, "one", FILES).created


def test_an_id_that_another_caller_publishes_at_this_moment_begins_anew(store: LocalStore) -> None:
    """Two clients push the same bytes to one name: their id is the same."""
    manifest = manifest_of("one", FILES)
    store.begin_upload(TENANT, ID, manifest)
    send(store, ID, FILES)
    staged = store._uploads._open[TENANT, ID]
    with ThreadPoolExecutor(1) as other:
        with staged.lock:  # the first is published, and its lock is free only then
            begun = other.submit(store.begin_upload, TENANT, ID, manifest)
            assert wait([begun], timeout=0.05).not_done
            staged.remove()
        assert {entry.received for entry in begun.result(30).files} == {0}
    send(store, ID, FILES)
    store.staged_files(TENANT, ID)
    assert store.publish(TENANT, ID, spec_of(FILES), BASE).created


def test_an_empty_chunk_changes_nothing(store: LocalStore) -> None:
    store.begin_upload(TENANT, ID, manifest_of("one", FILES))
    assert store.write_chunk(TENANT, ID, MODEL, 0, b"") == 0
    assert store.query_upload(TENANT, ID).files == store.begin_upload(TENANT, ID, manifest_of("one", FILES)).files


def test_a_large_file_is_synced_on_the_way(tmp_path: Path) -> None:
    files = {CONFIG: b"{}", MODEL: os.urandom(20 << 20)}
    with LocalStore(tmp_path) as store:
        store.begin_upload(TENANT, ID, manifest_of("large", files))
        send(store, ID, files, chunk=1 << 20)
        store.staged_files(TENANT, ID)
        record = store.publish(TENANT, ID, spec_of(files), BASE).record
        assert stored(store, record.digest) == files
        assert store.entries(TENANT, record.digest) == tuple(sorted(entries_of(files), key=lambda e: e.file))

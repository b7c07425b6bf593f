"""Stored bytes that rot: found at the load, remembered, healed by the same content."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterNotFound, StoreUnavailable
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import Health
from support.stores import (
    BASE,
    CONFIG,
    MODEL,
    TENANT,
    Fault,
    FaultyConnection,
    SteppedDisk,
    blob_files,
    content,
    digest_of,
    entries_of,
    put,
    spec_of,
    stage,
    stored,
)

FILES = content("one")
DIGEST = digest_of(FILES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path) as store:
        put(store, "one", FILES)
        put(store, "other", content("other"))
        yield store


def blob(root: Path, file: str) -> Path:
    sha256 = next(entry.sha256 for entry in entries_of(FILES) if entry.file == file)
    return root / "blobs" / sha256[:2] / sha256


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", [CONFIG, MODEL])
def test_a_flipped_bit_quarantines_the_adapter_and_nothing_else(store: LocalStore, tmp_path: Path, file: str) -> None:
    assert store.acquire(TENANT, "one")
    flip(blob(tmp_path, file))
    with pytest.raises(AdapterCorrupt):
        store.files(DIGEST)
    assert store.get(TENANT, "one").health is Health.CORRUPT
    with pytest.raises(AdapterCorrupt):
        store.acquire(TENANT, "one")
    assert stored(store, store.acquire(TENANT, "other").digest) == content("other")
    assert store.get(TENANT, "other").health is Health.OK


def test_the_quarantine_survives_a_restart(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        put(store, "one", FILES)
        flip(blob(tmp_path, MODEL))
        with pytest.raises(AdapterCorrupt):
            store.files(DIGEST)
    with LocalStore(tmp_path) as store:
        with pytest.raises(AdapterCorrupt):
            store.acquire(TENANT, "one")
        assert [record.health for record in store.list(TENANT).records] == [Health.CORRUPT]


def test_a_quarantined_adapter_is_refused_without_reading_it_again(tmp_path: Path) -> None:
    opened: list[Path] = []

    def note(operation: str, path: Path) -> None:
        if operation == "open":
            opened.append(path)

    with LocalStore(tmp_path, disk=SteppedDisk(note)) as store:
        put(store, "one", FILES)
        flip(blob(tmp_path, MODEL))
        for expected in (True, False):
            opened.clear()
            with pytest.raises(AdapterCorrupt):
                store.files(DIGEST)
            assert bool(opened) == expected


@pytest.mark.parametrize("reformatted", [False, True])
def test_the_same_content_again_heals(store: LocalStore, tmp_path: Path, reformatted: bool) -> None:
    flip(blob(tmp_path, CONFIG))
    with pytest.raises(AdapterCorrupt):
        store.files(DIGEST)
    files = {**FILES, CONFIG: b'{  "seed": "one" }'} if reformatted else FILES
    assert not put(store, "one", files).created
    assert store.get(TENANT, "one").health is Health.OK
    assert store.acquire(TENANT, "one").digest == DIGEST
    assert stored(store, DIGEST) == files
    assert len(blob_files(tmp_path)) == 4


def test_an_upload_heals_what_nobody_has_noticed_yet(store: LocalStore, tmp_path: Path) -> None:
    flip(blob(tmp_path, MODEL))
    put(store, "two", FILES)
    assert stored(store, DIGEST) == FILES


def test_a_file_that_is_gone_is_corrupt_too(store: LocalStore, tmp_path: Path) -> None:
    entry = next(entry for entry in store.entries(TENANT, DIGEST) if entry.file == MODEL)
    blob(tmp_path, MODEL).unlink()
    with pytest.raises(AdapterCorrupt):
        store.open_file(entry)
    with pytest.raises(AdapterCorrupt):
        store.files(DIGEST)
    put(store, "one", FILES)
    assert stored(store, DIGEST) == FILES


def test_another_tenants_intact_files_of_the_digest_serve(store: LocalStore, tmp_path: Path) -> None:
    theirs = {**FILES, CONFIG: b'{"theirs": true}'}
    put(store, "one", theirs, tenant="other")
    flip(blob(tmp_path, CONFIG))
    assert stored(store, DIGEST) == theirs
    with pytest.raises(AdapterCorrupt):
        store.acquire(TENANT, "one")
    assert store.acquire("other", "one").digest == DIGEST


def test_an_unknown_digest_has_no_files(store: LocalStore) -> None:
    with pytest.raises(AdapterNotFound):
        store.files("0" * 64)
    with pytest.raises(AdapterNotFound):
        store.entries(TENANT, "0" * 64)


def test_a_disk_that_cannot_be_read_is_no_proof_of_rot(tmp_path: Path) -> None:
    fault = Fault()
    with LocalStore(tmp_path, disk=SteppedDisk(fault)) as store:
        put(store, "one", FILES)
        fault.arm(errno.EIO, "open")
        with pytest.raises(StoreUnavailable, match="reports errors"):
            store.files(DIGEST)
        with pytest.raises(StoreUnavailable):
            store.open_file(store.entries(TENANT, DIGEST)[0])
        fault.clear()
        assert stored(store, DIGEST) == FILES
        assert store.get(TENANT, "one").health is Health.OK


def test_rot_is_refused_even_if_it_cannot_be_recorded(tmp_path: Path) -> None:
    class Full(FaultyConnection):
        pass

    def connect(path: Path, busy: float) -> Full:
        connection = schema.connect(path, busy, factory=Full)
        assert isinstance(connection, Full)
        return connection

    with LocalStore(tmp_path, connect=connect) as store:
        put(store, "one", FILES)
        flip(blob(tmp_path, MODEL))
        Full.statement = "UPDATE blobs"
        with pytest.raises(AdapterCorrupt):
            store.files(DIGEST)
        assert store.get(TENANT, "one").health is Health.OK
        Full.statement = ""
        with pytest.raises(AdapterCorrupt):
            store.files(DIGEST)
        assert store.get(TENANT, "one").health is Health.CORRUPT


def test_consent_to_another_base_is_remembered_with_the_version(tmp_path: Path) -> None:
    with LocalStore(tmp_path) as store:
        put(store, "plain", content("other"))
        upload_id = stage(store, "one", FILES, allow_base_mismatch=True)
        store.publish(TENANT, upload_id, spec_of(FILES, base_mismatch=True), BASE)
    with LocalStore(tmp_path) as store:
        assert store.consents_to_base(DIGEST)
        assert not store.consents_to_base(digest_of(content("other")))
        assert not store.consents_to_base("0" * 64)

"""A name pointed at a version that is kept: the switch, its condition, and what a name keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterConflict, AdapterCorrupt, AdapterInvalid, AdapterNotFound
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, Quotas
from support.stores import BASE, TENANT, content, digest_of, put, quick_store, spec_of, stage, stored

ONE, TWO, THREE, FOUR = (content(seed) for seed in ("one", "two", "three", "four"))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = quick_store(tmp_path, Quotas(keep_versions=3))
    for files in (ONE, TWO, THREE):
        put(store, "bot", files)
    return store


def switch(store: LocalStore, files: dict[str, bytes], **more: str) -> None:
    store.update(TENANT, "bot", AdapterUpdate(version=digest_of(files)[:12], **more))


def kept(store: LocalStore) -> list[str]:
    return list(store.get(TENANT, "bot").versions)


def test_a_name_goes_back_and_forth_and_keeps_what_it_had(store: LocalStore) -> None:
    assert kept(store) == [digest_of(files) for files in (THREE, TWO, ONE)]
    switch(store, TWO)
    record = store.get(TENANT, "bot")
    assert record.digest == digest_of(TWO)
    assert kept(store) == [digest_of(files) for files in (TWO, THREE, ONE)]
    with_hold = store.acquire(TENANT, "bot")
    assert with_hold.digest == digest_of(TWO)
    store.release(with_hold.digest)
    switch(store, THREE)
    assert kept(store) == [digest_of(files) for files in (THREE, TWO, ONE)]


def test_the_next_version_takes_the_place_of_the_one_that_was_current_longest_ago(store: LocalStore) -> None:
    switch(store, ONE)
    put(store, "bot", FOUR)
    assert kept(store) == [digest_of(files) for files in (FOUR, ONE, THREE)]
    with pytest.raises(AdapterNotFound, match="no name keeps a version that starts with"):
        switch(store, TWO)
    assert stored(store, digest_of(ONE)) == ONE


def test_a_version_of_another_name_of_the_same_tenant_can_be_taken(store: LocalStore) -> None:
    put(store, "candidate", FOUR)
    switch(store, FOUR, if_version=digest_of(THREE))
    store.delete(TENANT, "candidate")
    assert store.get(TENANT, "bot").digest == digest_of(FOUR)
    assert stored(store, digest_of(FOUR)) == FOUR


def test_what_another_tenant_has_cannot_be_taken(store: LocalStore) -> None:
    put(store, "theirs", FOUR, tenant="other")
    with pytest.raises(AdapterNotFound):
        switch(store, FOUR)
    with pytest.raises(AdapterNotFound):
        store.update("other", "bot", AdapterUpdate(version=digest_of(FOUR)[:12]))


def test_a_name_that_was_moved_meanwhile_is_left_as_it_is(store: LocalStore) -> None:
    """And nothing else of the change is applied."""
    with pytest.raises(AdapterConflict, match=f"'bot' points at {digest_of(THREE)[:12]}, not at {digest_of(TWO)[:12]}"):
        store.update(
            TENANT,
            "bot",
            AdapterUpdate(version=digest_of(ONE)[:12], if_version=digest_of(TWO)[:12], pinned=True),
        )
    record = store.get(TENANT, "bot")
    assert (record.digest, record.pinned) == (digest_of(THREE), False)
    store.update(TENANT, "bot", AdapterUpdate(if_version=digest_of(THREE), pinned=True))  # a condition alone
    assert store.get(TENANT, "bot").pinned


def test_an_upload_takes_a_name_only_as_its_caller_knows_it(store: LocalStore) -> None:
    put(store, "bot", FOUR, if_version=digest_of(THREE)[:8])
    assert store.get(TENANT, "bot").digest == digest_of(FOUR)
    put(store, "bot", FOUR, if_version=digest_of(THREE))  # as when the first answer was lost
    for condition, says in (
        (digest_of(THREE), f"'bot' points at {digest_of(FOUR)[:12]}, not at {digest_of(THREE)[:12]}"),
        ("", f"'bot' points at {digest_of(FOUR)[:12]}, and was to be new"),
    ):
        with pytest.raises(AdapterConflict, match=says):
            put(store, "bot", ONE, if_version=condition)
    with pytest.raises(AdapterConflict, match=f"'new' does not exist, not at {digest_of(ONE)[:12]}"):
        put(store, "new", ONE, if_version=digest_of(ONE))
    put(store, "new", ONE, if_version="")
    assert store.get(TENANT, "new").digest == digest_of(ONE)
    with pytest.raises(AdapterInvalid):
        put(store, "bot", TWO, if_version="abc")


def test_the_condition_of_an_upload_survives_the_store(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        upload = stage(store, "bot", ONE, if_version="")
    with quick_store(tmp_path) as store:
        put(store, "bot", TWO)
        store.staged_files(TENANT, upload)
        with pytest.raises(AdapterConflict, match="was to be new"):
            store.publish(TENANT, upload, spec_of(ONE), BASE)


def test_a_damaged_version_is_not_pointed_at(store: LocalStore, tmp_path: Path) -> None:
    for entry in store.entries(TENANT, digest_of(ONE)):
        path = tmp_path / "blobs" / entry.sha256[:2] / entry.sha256
        path.chmod(0o600)
        path.write_bytes(b"damaged")
    with pytest.raises(AdapterCorrupt):
        store.files(digest_of(ONE))
    with pytest.raises(AdapterCorrupt):
        switch(store, ONE)
    assert store.get(TENANT, "bot").digest == digest_of(THREE)


@pytest.mark.parametrize("prefix", ["abc", "ABCDEF0123", "x" * 12, "0" * 65])
def test_what_is_no_start_of_a_digest_is_refused(store: LocalStore, prefix: str) -> None:
    for change in (AdapterUpdate(version=prefix), AdapterUpdate(if_version=prefix)):
        with pytest.raises(AdapterInvalid):
            store.update(TENANT, "bot", change)


def test_the_switch_survives_the_store(store: LocalStore, tmp_path: Path) -> None:
    switch(store, ONE)
    store.close()
    with quick_store(tmp_path) as again:
        assert again.get(TENANT, "bot").digest == digest_of(ONE)
        assert list(again.get(TENANT, "bot").versions) == [digest_of(files) for files in (ONE, THREE, TWO)]

"""What the store tells those who hold copies: which versions are gone for good, which are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorica_adapters.errors import AdapterNotFound
from lorica_adapters.store.local import LocalStore
from lorica_adapters.store.records import Quotas
from support.stores import TENANT, content, digest_of, put, quick_store, stored

ONE, TWO, THREE = (digest_of(content(seed)) for seed in ("one", "two", "three"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with quick_store(tmp_path, Quotas(keep_versions=2)) as store:
        yield store


def test_a_deleted_version_is_told_once(store: LocalStore) -> None:
    put(store, "a", content("one"))
    assert store.take_removed() == frozenset()
    store.delete(TENANT, "a")
    assert store.take_removed() == {ONE}
    assert store.take_removed() == frozenset()


def test_what_another_name_or_tenant_keeps_is_not_gone(store: LocalStore) -> None:
    put(store, "a", content("one"))
    put(store, "b", content("one"))
    put(store, "a", content("one"), tenant="other")
    for tenant, name in ((TENANT, "a"), (TENANT, "b")):
        store.delete(tenant, name)
        assert store.take_removed() == frozenset()
    assert set(stored(store, ONE))
    store.delete("other", "a")
    assert store.take_removed() == {ONE}
    with pytest.raises(AdapterNotFound):
        store.files(ONE)


def test_a_superseded_version_is_kept_then_gone(store: LocalStore) -> None:
    for seed in ("one", "two", "three"):
        put(store, "a", content(seed))
    assert store.take_removed() == {ONE}  # two are kept
    store.delete(TENANT, "a")
    assert store.take_removed() == {TWO, THREE}


def test_a_pinned_version_is_gone_with_its_last_pin(store: LocalStore) -> None:
    put(store, "a", content("one"))
    store.acquire(TENANT, "a")
    store.acquire(TENANT, "a")
    store.delete(TENANT, "a")
    assert store.take_removed() == frozenset()
    assert not store.unpin(ONE)
    assert store.unpin(ONE)
    store.collect()
    assert store.take_removed() == {ONE}


def test_named_is_what_a_name_points_at_now(store: LocalStore) -> None:
    put(store, "a", content("one"))
    put(store, "b", content("one"))
    assert store.is_named(ONE)
    put(store, "a", content("two"))
    assert store.is_named(ONE)  # by b
    assert store.is_named(TWO)
    put(store, "b", content("two"))
    assert not store.is_named(ONE)  # kept, not named
    assert store.get(TENANT, "a", ONE[:8]).digest == ONE
    put(store, "a", content("one"))
    assert store.is_named(ONE)
    store.delete(TENANT, "a")
    assert not store.is_named(ONE)

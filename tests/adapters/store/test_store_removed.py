"""What the store tells those who hold copies: which versions are gone for good, which are desired."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, DesiredState, Quotas
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


def test_a_held_version_is_gone_with_its_last_hold(store: LocalStore) -> None:
    put(store, "a", content("one"))
    store.acquire(TENANT, "a")
    store.acquire(TENANT, "a")
    store.delete(TENANT, "a")
    assert store.take_removed() == frozenset()
    assert not store.release(ONE)
    assert store.release(ONE)
    store.collect()
    assert store.take_removed() == {ONE}


def test_a_desired_state_follows_its_name(store: LocalStore) -> None:
    put(store, "a", content("one"))
    assert store.desired_state() == DesiredState()
    store.update(TENANT, "a", AdapterUpdate(pinned=True, merge=True))
    assert store.desired_state() == DesiredState(pinned=frozenset({ONE}), merged=frozenset({ONE}))
    put(store, "a", content("two"))
    assert store.get(TENANT, "a", ONE[:8]).digest == ONE  # kept, and nobody's desired state
    assert store.desired_state() == DesiredState(pinned=frozenset({TWO}), merged=frozenset({TWO}))
    store.update(TENANT, "a", AdapterUpdate(pinned=False))
    assert store.desired_state() == DesiredState(merged=frozenset({TWO}))
    store.delete(TENANT, "a")
    put(store, "a", content("two"))
    assert store.desired_state() == DesiredState()  # another name of the same spelling


def test_a_digest_is_desired_while_any_name_of_any_tenant_does(store: LocalStore) -> None:
    for tenant, name in ((TENANT, "a"), (TENANT, "b"), ("other", "a")):
        put(store, name, content("one"), tenant=tenant)
        store.update(tenant, name, AdapterUpdate(merge=True))
    store.delete(TENANT, "a")
    store.update(TENANT, "b", AdapterUpdate(merge=False))
    assert store.desired_state().merged == {ONE}
    store.update("other", "a", AdapterUpdate(merge=False))
    assert store.desired_state() == DesiredState()


def test_desired_state_outlives_a_restart(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        put(store, "a", content("one"))
        put(store, "b", content("two"))
        store.update(TENANT, "a", AdapterUpdate(merge=True))
        store.update(TENANT, "b", AdapterUpdate(pinned=True))
    with quick_store(tmp_path) as store:
        assert store.desired_state() == DesiredState(pinned=frozenset({TWO}), merged=frozenset({ONE}))
        assert (store.get(TENANT, "a").pinned, store.get(TENANT, "a").merge) == (False, True)

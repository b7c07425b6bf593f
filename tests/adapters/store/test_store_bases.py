"""Which bases a version was accepted for: of all tenants' copies, by every publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.store.local import LocalStore
from support.stores import BASE, CONFIG, OTHER_BASE, TENANT, content, digest_of, put, quick_store, stored

FILES = content("one")
DIGEST = digest_of(FILES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with quick_store(tmp_path) as store:
        yield store


def test_a_version_knows_the_bases_it_was_published_for(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        assert store.accepted_bases(DIGEST) == frozenset()
        assert put(store, "a", FILES).record.bases == {BASE}
    with quick_store(tmp_path) as store:
        assert store.accepted_bases(DIGEST) == {BASE}
        again = put(store, "a", FILES, base=OTHER_BASE)
        assert (again.created, again.record.bases) == (False, {BASE, OTHER_BASE})
        assert store.accepted_bases(DIGEST) == {BASE, OTHER_BASE}
        put(store, "a", FILES)
        assert store.accepted_bases(DIGEST) == {BASE, OTHER_BASE}


def test_other_files_of_the_same_content_leave_the_bytes_and_add_the_base(store: LocalStore) -> None:
    put(store, "a", FILES)
    put(store, "a", {**FILES, CONFIG: b"{}"}, base=OTHER_BASE)
    assert stored(store, DIGEST) == FILES
    assert store.accepted_bases(DIGEST) == {BASE, OTHER_BASE}


def test_nobody_takes_a_base_from_another_tenant(store: LocalStore) -> None:
    put(store, "a", FILES)
    put(store, "a", FILES, tenant="other", base=OTHER_BASE)
    for tenant in (TENANT, "other"):
        assert store.get(tenant, "a").bases == {BASE, OTHER_BASE}
    store.delete(TENANT, "a")
    assert store.accepted_bases(DIGEST) == {OTHER_BASE}


@pytest.mark.parametrize("base", ["", "B" * 64, "b" * 63])
def test_a_base_is_a_fingerprint(store: LocalStore, base: str) -> None:
    with pytest.raises(AdapterInvalid, match="base"):
        put(store, "a", FILES, base=base)
    assert store.list(TENANT).records == ()

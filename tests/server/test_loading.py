"""AdapterLoader over the real store: which versions the base served may load, and that content is identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from sqlite3 import connect

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterIncompatible, AdapterNotFound
from loramux_adapters.store.local import LocalStore
from loramux_server.adapter_loader import AdapterLoader
from support.stores import (
    BASE,
    MODEL,
    OTHER_BASE,
    TENANT,
    FakeWeights,
    content,
    digest_of,
    put,
    quick_store,
    spec_of,
    stage,
)

FILES = content("one")
DIGEST = digest_of(FILES)


class Declared:
    """Reads files that declare `base`, as a format does: one other than BASE is refused without consent."""

    def __init__(self, base: str | None = None) -> None:
        self.base = base

    def __call__(self, files: Mapping[str, Path], *, allow_base_mismatch: bool) -> FakeWeights:
        if self.base not in (None, BASE) and not allow_base_mismatch:
            raise AdapterIncompatible("the adapter was trained on another base")
        return FakeWeights(spec_of({MODEL: files[MODEL].read_bytes()}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with quick_store(tmp_path) as store:
        yield store


Load = Callable[..., FakeWeights]


@pytest.fixture
def load(store: LocalStore) -> Load:
    def load(digest: str = DIGEST, *, declares: str | None = None) -> FakeWeights:
        return AdapterLoader(store, Declared(declares), BASE).load(digest)

    return load


def test_what_was_accepted_for_the_base_served_is_loaded(store: LocalStore, load: Load) -> None:
    put(store, "a", FILES)
    assert load().spec.digest == DIGEST
    with pytest.raises(AdapterNotFound):
        load("0" * 64)


def test_another_base_is_refused_until_it_is_uploaded_again(store: LocalStore, load: Load) -> None:
    put(store, "a", FILES, base=OTHER_BASE)
    with pytest.raises(AdapterIncompatible) as caught:
        load()
    assert str(caught.value) == (
        f"adapter {DIGEST[:12]} was accepted for base {OTHER_BASE}, this server holds {BASE}; "
        "upload it again for this base"
    )
    put(store, "a", FILES)
    assert load().spec.digest == DIGEST


def test_an_upload_for_another_base_takes_nothing_from_another_tenant(store: LocalStore, load: Load) -> None:
    put(store, "a", FILES)
    put(store, "a", FILES, tenant="other", base=OTHER_BASE)
    assert load().spec.digest == DIGEST
    store.delete(TENANT, "a")
    with pytest.raises(AdapterIncompatible):
        load()


def test_a_version_of_an_older_catalog_is_loaded_as_it_was(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        put(store, "a", FILES, base=OTHER_BASE)
        put(store, "a", FILES, tenant="other", base=OTHER_BASE)
    with closing(connect(tmp_path / "catalog.sqlite3")) as catalog, catalog:
        catalog.execute("UPDATE versions SET bases = '' WHERE tenant = ?", (TENANT,))
    with quick_store(tmp_path) as store:
        assert AdapterLoader(store, Declared(), BASE).load(DIGEST).spec.digest == DIGEST
        with pytest.raises(AdapterIncompatible, match="trained on another base"):
            AdapterLoader(store, Declared(OTHER_BASE), BASE).load(DIGEST)


def test_consent_to_a_declared_base_is_for_the_base_it_was_given_on(store: LocalStore, load: Load) -> None:
    def agree(base: str) -> None:
        upload_id = stage(store, "a", FILES, allow_base_mismatch=True)
        store.publish(TENANT, upload_id, replace(spec_of(FILES), base_mismatch=True), base)

    agree(OTHER_BASE)
    with pytest.raises(AdapterIncompatible, match="upload it again"):
        load(declares="d" * 64)
    agree(BASE)
    assert load(declares="d" * 64).spec.digest == DIGEST


def test_first_files_that_declare_another_base_serve_once_their_content_is_accepted(
    store: LocalStore, load: Load
) -> None:
    """The bytes of the first upload stay, whatever the files of a later one say beside the same tensors."""
    put(store, "a", FILES, base=OTHER_BASE)
    put(store, "a", {**FILES, "loramux.json": b"{}"})
    assert load(declares=OTHER_BASE).spec.digest == DIGEST


def test_files_that_hold_another_adapter_are_corrupt(store: LocalStore, load: Load) -> None:
    """Every hash is right, only the catalog leads to the wrong files."""
    digest = "0" * 64
    store.publish(TENANT, stage(store, "a", FILES), replace(spec_of(FILES), digest=digest), BASE)
    with pytest.raises(AdapterCorrupt, match=f"stored as 000000000000 hold adapter {DIGEST[:12]}; remove it"):
        load(digest)

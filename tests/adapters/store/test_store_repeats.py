"""The same content uploaded again under its name: what it does not say stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.store.records import Lifetime
from support.stores import TENANT, content, digest_of, put, quick_store

FILES = content("one")
START = 1_000.0


def test_an_end_stays_that_the_repeat_does_not_name(tmp_path: Path) -> None:
    now = START
    with quick_store(tmp_path, clock=lambda: now) as store:
        put(store, "one", FILES, ttl_seconds=60.0, max_uses=3)
        use = store.acquire(TENANT, "one", counts=True).use
        assert use is not None
        store.count_use(use)
        now = START + 50
        assert not put(store, "one", FILES).created
        assert store.get(TENANT, "one").lifetime == Lifetime(START + 60, 3, 2)
        put(store, "one", FILES, max_uses=5)
        assert store.get(TENANT, "one").lifetime == Lifetime(None, 5, 5)


def test_a_repeat_that_heals_makes_no_name_one_that_stays(tmp_path: Path) -> None:
    with quick_store(tmp_path) as store:
        put(store, "one", FILES, max_uses=3)
        for blob in (path for path in (tmp_path / "blobs").rglob("*") if path.is_file()):
            blob.write_bytes(b"damaged")
        with pytest.raises(AdapterCorrupt):
            store.files(digest_of(FILES))
        put(store, "one", FILES)
        assert store.files(digest_of(FILES))
        assert store.get(TENANT, "one").lifetime == Lifetime(None, 3, 3)
        put(store, "stays", content("two"))
        journal = (tmp_path / "published.jsonl").read_bytes()
        assert (b'"one"' in journal, b'"stays"' in journal) == (False, True)  # restored it would have no end

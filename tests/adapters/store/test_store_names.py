"""Names, versions, aliases, labels: what points at what, and how it changes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterConflict, AdapterInvalid, AdapterNotFound
from loramux_adapters.spec import AdapterId, AdapterSpec
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterNames, AdapterUpdate, Health, Quotas
from loramux_adapters.store.spec_json import decode_spec, encode_spec
from support.stores import (
    BASE,
    CONFIG,
    TENANT,
    blob_files,
    content,
    digest_of,
    manifest_of,
    put,
    spec_of,
    stage,
    stored,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path) as store:
        yield store


def test_what_was_published_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    files = content("one")
    with LocalStore(tmp_path, clock=lambda: 1000.5) as store:
        published = put(store, "one", files, labels={"team": "sql"})
    assert published.created
    with LocalStore(tmp_path) as store:
        record = store.get(TENANT, "one")
        assert record == published.record
        assert record.id == AdapterId(TENANT, "one")
        assert record.spec == spec_of(files)
        assert (record.labels, record.aliases, record.pinned) == ({"team": "sql"}, (), False)
        assert (record.created, record.updated, record.health) == (1000.5, 1000.5, Health.OK)
        assert stored(store, record.digest) == files


def test_a_spec_survives_its_json() -> None:
    spec = AdapterSpec(
        digest="ab" * 32,
        kind="lora",
        base_fingerprint="cd" * 32,
        base_mismatch=True,
        ranks={"a.b": 3, "c": 512},
        biases=frozenset({"z", "y"}),
        nbytes=1 << 40,
    )
    assert decode_spec(encode_spec(spec)) == spec
    own = replace(spec, vocabulary=325, invocation=(1, 2), text_files=(("tokenizer.json", "ef" * 32),))
    assert decode_spec(encode_spec(own)) == own
    assert decode_spec(encode_spec(spec)[:-1] + ',"prefix_tokens":0}') == spec  # as older catalogs have it
    assert encode_spec(spec) == encode_spec(replace(spec, biases=frozenset({"y", "z"})))


def test_the_same_content_again_changes_nothing_and_gives_the_first_bytes_back(store: LocalStore) -> None:
    files = content("one")
    first = put(store, "one", files)
    reformatted = {**files, CONFIG: b'{ "seed":   "one" }'}
    assert digest_of(reformatted) == first.record.digest
    again = put(store, "one", reformatted)
    assert not again.created
    assert again.record.updated == first.record.updated
    assert stored(store, first.record.digest) == files


def test_two_names_of_one_content_are_independent(store: LocalStore, tmp_path: Path) -> None:
    files = content("one")
    digest = put(store, "one", files).record.digest
    assert put(store, "two", files).created
    store.delete(TENANT, "one")
    with pytest.raises(AdapterNotFound):
        store.get(TENANT, "one")
    assert store.acquire(TENANT, "two").digest == digest
    assert len(blob_files(tmp_path)) == 2


def test_a_replaced_name_points_at_the_new_version_and_keeps_its_past_reachable(store: LocalStore) -> None:
    old, new = content("old"), content("new")
    put(store, "one", old, labels={"k": "v"})
    published = put(store, "one", new)
    assert published.created
    assert published.record.digest == digest_of(new)
    assert published.record.labels == {"k": "v"}
    past = store.get(TENANT, "one", digest_of(old)[:8])
    assert past.digest == digest_of(old)
    assert store.acquire(TENANT, "one", digest_of(old)).spec == spec_of(old)
    assert store.acquire(TENANT, "one", digest_of(new)[:12]).digest == digest_of(new)
    with pytest.raises(AdapterNotFound):
        store.acquire(TENANT, "one", "0" * 8)


def test_only_the_last_versions_of_a_name_are_kept(tmp_path: Path) -> None:
    versions = [content(f"v{number}") for number in range(5)]
    with LocalStore(tmp_path, Quotas(keep_versions=3)) as store:
        for files in versions:
            put(store, "one", files)
        for files in versions[2:]:
            assert stored(store, store.get(TENANT, "one", digest_of(files)[:8]).digest) == files
        for files in versions[:2]:
            with pytest.raises(AdapterNotFound):
                store.get(TENANT, "one", digest_of(files)[:8])
            with pytest.raises(AdapterNotFound):
                store.files(digest_of(files))
        assert len(blob_files(tmp_path)) == 6
        # Going back to a kept version makes it the newest.
        assert put(store, "one", versions[2]).created
        put(store, "one", content("v5"))
        assert store.get(TENANT, "one", digest_of(versions[2])[:8])
        with pytest.raises(AdapterNotFound):
            store.get(TENANT, "one", digest_of(versions[3])[:8])


def test_a_prefix_that_fits_two_versions_is_refused(store: LocalStore) -> None:
    for seed, digest in (("a", "0" * 63 + "1"), ("b", "0" * 63 + "2")):
        files = content(seed)
        put_as(store, "one", files, digest)
    with pytest.raises(AdapterInvalid, match="2 versions"):
        store.acquire(TENANT, "one", "0" * 8)
    assert store.acquire(TENANT, "one", "0" * 63 + "1").digest == "0" * 63 + "1"


def put_as(store: LocalStore, name: str, files: dict[str, bytes], digest: str) -> None:
    """Publish under a chosen digest."""
    store.publish(TENANT, stage(store, name, files), replace(spec_of(files), digest=digest), BASE)


@pytest.mark.parametrize("prefix", ["0123456", "0123456G", "ABCDEF01", "0" * 65, "%%%%%%%%", "12345678\n"])
def test_a_version_must_be_8_to_64_hex_digits(store: LocalStore, prefix: str) -> None:
    put(store, "one", content("one"))
    with pytest.raises(AdapterInvalid):
        store.acquire(TENANT, "one", prefix)


def test_tenants_do_not_see_each_other_and_share_no_file_names(store: LocalStore) -> None:
    files = content("one")
    mine = {**files, CONFIG: b'{"made by": "me"}'}
    put(store, "one", files, tenant="other")
    with pytest.raises(AdapterNotFound):
        store.get(TENANT, "one")
    with pytest.raises(AdapterNotFound):
        store.acquire(TENANT, "one", digest_of(files)[:8])
    with pytest.raises(AdapterNotFound):
        store.entries(TENANT, digest_of(files))
    assert put(store, "one", mine).created
    # One digest, but each tenant gets back what it sent.
    entry = next(entry for entry in store.entries(TENANT, digest_of(files)) if entry.file == CONFIG)
    with store.open_file(entry) as stream:
        assert stream.read() == mine[CONFIG]
    store.delete("other", "one")
    assert stored(store, digest_of(files)) == mine


def test_what_points_at_a_digest_now(store: LocalStore) -> None:
    one, two = content("one"), content("two")
    put(store, "a", one)
    put(store, "b", one)
    put(store, "c", two, tenant="other")
    store.update(TENANT, "b", AdapterUpdate(add_aliases=("y", "x")))
    store.update(TENANT, "a", AdapterUpdate(add_aliases=("z",)))
    first, second = digest_of(one), digest_of(two)
    assert store.names([first, second, "0" * 64]) == {
        first: AdapterNames(("a", "b"), ("x", "y", "z")),
        second: AdapterNames(("c",), ()),
    }
    put(store, "a", two)
    assert store.names([first]) == {first: AdapterNames(("b",), ("x", "y"))}
    assert store.names([]) == {}


def test_an_alias_follows_its_name(store: LocalStore) -> None:
    put(store, "sql-v1", content("v1"))
    record = store.update(TENANT, "sql-v1", AdapterUpdate(add_aliases=("sql", "prod")))
    assert record.aliases == ("prod", "sql")
    assert store.acquire(TENANT, "sql").id.name == "sql-v1"
    put(store, "sql-v1", content("v1b"))
    assert store.get(TENANT, "sql").digest == digest_of(content("v1b"))
    assert store.get(TENANT, "sql", digest_of(content("v1"))[:8]).digest == digest_of(content("v1"))


def test_an_alias_moves_in_one_step(store: LocalStore) -> None:
    put(store, "v1", content("v1"))
    put(store, "v2", content("v2"))
    store.update(TENANT, "v1", AdapterUpdate(add_aliases=("live",)))
    store.update(TENANT, "v2", AdapterUpdate(add_aliases=("live",)))
    assert store.get(TENANT, "live").id.name == "v2"
    assert store.get(TENANT, "v1").aliases == ()
    store.update(TENANT, "v1", AdapterUpdate(remove_aliases=("live",)))  # not its own any more: nothing happens
    assert store.get(TENANT, "live").id.name == "v2"
    store.update(TENANT, "v2", AdapterUpdate(remove_aliases=("live",)))
    with pytest.raises(AdapterNotFound):
        store.get(TENANT, "live")


def test_names_and_aliases_share_one_namespace(store: LocalStore) -> None:
    put(store, "one", content("one"))
    put(store, "two", content("two"))
    with pytest.raises(AdapterConflict):
        store.update(TENANT, "one", AdapterUpdate(add_aliases=("two",)))
    with pytest.raises(AdapterConflict):
        store.update(TENANT, "one", AdapterUpdate(add_aliases=("one",)))
    store.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    with pytest.raises(AdapterConflict):
        store.begin_upload(TENANT, "upload-0001", manifest_of("uno", content("x")))
    with pytest.raises(AdapterInvalid):
        store.update(TENANT, "one", AdapterUpdate(add_aliases=("a/b",)))
    with pytest.raises(AdapterInvalid):
        store.update(TENANT, "one", AdapterUpdate(add_aliases=tuple(f"alias-{n}" for n in range(33))))
    assert store.get(TENANT, "one").aliases == ("uno",)


def test_an_alias_that_came_during_the_upload_wins(store: LocalStore) -> None:
    put(store, "one", content("one"))
    upload_id = stage(store, "uno", content("x"))
    store.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    with pytest.raises(AdapterConflict):
        store.publish(TENANT, upload_id, spec_of(content("x")), BASE)
    store.update(TENANT, "one", AdapterUpdate(remove_aliases=("uno",)))
    assert store.publish(TENANT, upload_id, spec_of(content("x")), BASE).created


def test_update_and_delete_take_names_and_say_so_of_aliases(store: LocalStore) -> None:
    put(store, "one", content("one"))
    store.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    with pytest.raises(AdapterNotFound, match="alias of 'one'"):
        store.delete(TENANT, "uno")
    with pytest.raises(AdapterNotFound, match="alias of 'one'"):
        store.update(TENANT, "uno", AdapterUpdate(pinned=True))
    with pytest.raises(AdapterNotFound):
        store.update(TENANT, "nobody", AdapterUpdate(pinned=True))
    with pytest.raises(AdapterNotFound):
        store.delete(TENANT, "nobody")


def test_only_what_is_said_changes(tmp_path: Path) -> None:
    now = [1.0]
    with LocalStore(tmp_path, clock=lambda: now[0]) as store:
        put(store, "one", content("one"), labels={"a": "1", "b": "2"})
        now[0] = 2.0
        record = store.update(TENANT, "one", AdapterUpdate(pinned=True))
        assert (record.pinned, record.labels) == (True, {"a": "1", "b": "2"})
        assert (record.created, record.updated) == (1.0, 2.0)
        record = store.update(TENANT, "one", AdapterUpdate(set_labels={"c": "3"}, remove_labels=("a", "nothing")))
        assert (record.pinned, record.labels) == (True, {"b": "2", "c": "3"})
        with pytest.raises(AdapterInvalid):
            store.update(TENANT, "one", AdapterUpdate(set_labels={f"k{n}": "" for n in range(63)}))
        assert store.get(TENANT, "one").labels == {"b": "2", "c": "3"}


def test_deleting_takes_aliases_versions_and_bytes_along(store: LocalStore, tmp_path: Path) -> None:
    put(store, "one", content("v1"))
    put(store, "one", content("v2"))
    store.update(TENANT, "one", AdapterUpdate(add_aliases=("uno",)))
    store.delete(TENANT, "one")
    for reference in ("one", "uno"):
        with pytest.raises(AdapterNotFound):
            store.acquire(TENANT, reference)
    assert blob_files(tmp_path) == set()
    put(store, "uno", content("v1"))
    with pytest.raises(AdapterNotFound):
        store.get(TENANT, "uno", digest_of(content("v2"))[:8])


def test_pages_come_by_name_and_hold_against_changes_between_them(store: LocalStore) -> None:
    names = [f"a{number:02}" for number in range(7)]
    for name in names:
        put(store, name, content("shared"))
    first = store.list(TENANT, 3)
    assert [record.id.name for record in first.records] == names[:3]
    store.delete(TENANT, "a02")
    second = store.list(TENANT, 3, first.next_page_token)
    assert [record.id.name for record in second.records] == names[3:6]
    last = store.list(TENANT, 3, second.next_page_token)
    assert ([record.id.name for record in last.records], last.next_page_token) == (names[6:], "")
    assert store.list(TENANT, 6).next_page_token == ""
    assert store.list("other").records == ()


@pytest.mark.parametrize(("size", "token"), [(0, ""), (-1, ""), (1001, ""), (5, "%%%"), (5, "Li4vLi4"), (5, "ä")])
def test_page_size_and_token_are_checked(store: LocalStore, size: int, token: str) -> None:
    with pytest.raises(AdapterInvalid):
        store.list(TENANT, size, token)

"""What was meant by an absent name: the nearest names of the caller's own, found in a bounded number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store import schema
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.nearby import _count_common, find_nearest, suggest
from loramux_adapters.store.records import AdapterUpdate
from support.stores import TENANT, content, digest_of, put, quick_store

OTHER = "other"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with quick_store(tmp_path) as store:
        put(store, "support-bot", content("a"))
        put(store, "sql", content("b"))
        store.update(TENANT, "sql", AdapterUpdate(add_aliases=("production",)))
        put(store, "summaries", content("c"), tenant=OTHER)
        store.update(OTHER, "summaries", AdapterUpdate(add_aliases=("secretary",)))
        yield store


def _told(call: Callable[..., object], *arguments: Any) -> str:
    with pytest.raises(AdapterNotFound) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("suport-bot", "no adapter 'suport-bot'; did you mean 'support-bot'?"),
        ("Support-Bot", "no adapter 'Support-Bot'; did you mean 'support-bot'?"),
        ("support", "no adapter 'support'; did you mean 'support-bot'?"),
        ("prodution", "no adapter 'prodution'; did you mean 'production'?"),
        ("nobody", "no adapter 'nobody'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(store: LocalStore, name: str, said: str) -> None:
    assert _told(store.acquire, TENANT, name) == said
    assert _told(store.get, TENANT, name) == said


def test_a_version_is_asked_for_by_name(store: LocalStore) -> None:
    digest = digest_of(content("a"))
    assert _told(store.acquire, TENANT, "suport-bot", digest[:8]).endswith("; did you mean 'support-bot'?")
    for known in ("sql", "production"):
        said = f"no adapter '{known}@{digest[:8]}'; '{known}' is there, and no version of it that is kept starts with"
        assert _told(store.acquire, TENANT, known, digest[:8]) == f"{said} {digest[:8]}"


def test_where_an_alias_will_not_do_none_is_named(store: LocalStore) -> None:
    for call in (store.delete, lambda *name: store.update(*name, AdapterUpdate(pinned=True))):
        assert _told(call, TENANT, "suport-bot") == "no adapter named 'suport-bot'; did you mean 'support-bot'?"
        assert _told(call, TENANT, "prodution") == "no adapter named 'prodution'"


def test_names_of_other_tenants_are_never_told(store: LocalStore) -> None:
    for name in ("summaries", "summarie", "secretary", "secretar"):
        for call in (store.acquire, store.get, store.delete):
            assert "did you mean" not in _told(call, TENANT, name)
    assert _told(store.get, OTHER, "summarie").endswith("did you mean 'summaries'?")


def test_of_several_that_are_alike_the_most_alike_come_first(tmp_path: Path) -> None:
    assert find_nearest("task-12", ["task-1", "task-13", "task-120", "task-21", "task-9", "sql"]) == [
        "task-120", "task-1", "task-13",
    ]  # fmt: skip
    with quick_store(tmp_path) as store:
        for name in ("bot-a", "bot-b", "bot-c"):
            put(store, name, content(name))
        assert _told(store.get, TENANT, "bot-d").endswith("did you mean 'bot-a', 'bot-b' or 'bot-c'?")
        store.delete(TENANT, "bot-b")
        assert _told(store.get, TENANT, "bot-d").endswith("did you mean 'bot-a' or 'bot-c'?")


def test_among_thousands_few_names_are_read_and_all_by_an_index() -> None:
    connection = connect(":memory:", isolation_level=None)
    schema.create_tables(connection)
    connection.executemany(
        "INSERT INTO names (tenant, name, version, created, updated) VALUES (?, ?, 1, 0, 0)",
        [(tenant, f"adapter-{number:05}") for number in range(5000) for tenant in (TENANT, OTHER)],
    )
    connection.executemany(
        "INSERT INTO aliases (tenant, alias, name) VALUES (?, ?, ?)",
        [(TENANT, f"alias-{number:05}", f"adapter-{number:05}") for number in range(5000)],
    )
    read = 0

    def count(sql: str, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        nonlocal read
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        searches = [step for step in plan if "names" in step or "aliases" in step]
        assert len(searches) == 4
        assert all(step.startswith("SEARCH") for step in searches), plan
        rows = connection.execute(sql, values).fetchall()
        read += len(rows)
        return rows

    assert suggest(count, TENANT, "adapter-02x17", aliases=True).startswith("did you mean 'adapter-02")
    assert read <= 4 * 32
    connection.close()


WORDS = st.text("abc", min_size=1, max_size=12)


@given(WORDS, WORDS)
def test_what_two_names_have_in_common_is_their_longest_common_subsequence(one: str, other: str) -> None:
    lengths = [0] * (len(other) + 1)
    for character in one:
        before = list(lengths)
        for place, against in enumerate(other, 1):
            same = before[place - 1] + (character == against)
            lengths[place] = max(before[place], lengths[place - 1], same)
    places: dict[str, int] = {}
    for place, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << place
    assert _count_common(places, len(one), other) == lengths[-1]

"""Combined adapters through the registry: what is held, what a loader finds, and that nothing outlives its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_adapters.combination import Combination
from loramux_adapters.errors import AdapterIncompatible, AdapterNotFound
from loramux_adapters.spec import AdapterSpec
from loramux_server.adapter_loader import CombinationLoader
from loramux_server.combinations import Combinations
from loramux_server.registry import Registry
from support.caches import Caches
from support.stores import BASE, TENANT, content, digest_of, manifest_of, new_id, put, quick_store, read_facts, spec_of

FILES = {name: content(name) for name in ("style", "facts", "other")}
DIGESTS = {name: digest_of(files) for name, files in FILES.items()}
BOTH = [("style", 0.7), ("facts", 1.0)]


@pytest.fixture
def combinations() -> Combinations:
    return Combinations(most_remembered=2)


@pytest.fixture
def caches() -> Caches:
    return Caches()


@pytest.fixture
def registry(tmp_path: Path, caches: Caches, combinations: Combinations) -> Iterator[Registry]:
    store = quick_store(tmp_path)
    for name, files in FILES.items():
        put(store, name, files)
    registry = Registry(store, read_facts, BASE, caches, combinations=combinations)
    yield registry
    registry.close()


async def push(registry: Registry, name: str, files: str = "", **lifetime: int) -> None:
    upload_id = new_id()
    await registry.begin_upload(TENANT, upload_id, manifest_of(name, FILES[files or name], **lifetime))
    for file, data in FILES[files or name].items():
        await registry.write_chunk(TENANT, upload_id, file, 0, data)
    await registry.publish(TENANT, upload_id)


@pytest.mark.asyncio
async def test_one_alone_is_itself_and_several_are_one_derived(registry: Registry, combinations: Combinations) -> None:
    with registry.resolve_all(TENANT, [("style", 1.0)]) as alone:
        assert alone.digest == DIGESTS["style"]
    with registry.resolve_all(TENANT, BOTH) as held:
        assert held.name == "style=0.7+facts"
        assert held.digest not in DIGESTS.values()
        found = combinations.find(held.digest)
        assert found is not None
        assert dict(found.terms) == {DIGESTS["style"]: 0.7, DIGESTS["facts"]: 1.0}
        assert held.spec.digest == held.digest
        assert registry.existing([held.digest, "0" * 64]) == {held.digest}
        assert registry.names([held.digest, DIGESTS["style"]]).keys() == {held.digest, DIGESTS["style"]}
    with registry.resolve_all(TENANT, BOTH[::-1]) as again:
        assert again.digest == held.digest


@pytest.mark.asyncio
async def test_a_refused_combination_holds_nothing(registry: Registry, caches: Caches) -> None:
    with pytest.raises(AdapterIncompatible, match="one and the same content"):
        registry.resolve_all(TENANT, [("style", 1.0), (f"style@{DIGESTS['style'][:8]}", 0.5)])
    with pytest.raises(AdapterNotFound):
        registry.resolve_all(TENANT, [("style", 1.0), ("absent", 0.5)])
    await registry.delete(TENANT, "style")
    assert caches.evicted == [DIGESTS["style"]]  # nobody holds it any more


def test_one_that_is_too_large_is_refused_before_anything_is_read(tmp_path: Path, caches: Caches) -> None:
    store = quick_store(tmp_path)
    for name, files in FILES.items():
        put(store, name, files)
    both = 2 * spec_of(FILES["style"]).nbytes
    for limits, why in (
        ({"most_rank": 15}, "the ranks of style=0.7\\+facts add up to 16, and one request may use 15"),
        ({"most_bytes": both - 1}, f"add up to {both}, and one request may use {both - 1}"),
    ):
        registry = Registry(store, read_facts, BASE, caches, combinations=Combinations(**limits))
        with pytest.raises(AdapterIncompatible, match=why):
            registry.resolve_all(TENANT, BOTH)
        assert not registry._combinations._known
    store.close()


@pytest.mark.asyncio
async def test_what_is_held_outlives_its_names_and_leaves_with_its_adapters(
    registry: Registry, combinations: Combinations, caches: Caches
) -> None:
    held = registry.resolve_all(TENANT, BOTH)
    with registry.resolve_all(TENANT, [("facts", 0.5)]) as unconcerned:
        pass
    await registry.delete(TENANT, "style")
    assert combinations.find(held.digest) is not None
    assert not caches.evicted
    held.release()
    held.release()  # again is harmless
    registry._worker.submit(lambda: None).result(30)  # what the release collects
    assert caches.evicted == [DIGESTS["style"], held.digest]
    assert combinations.find(held.digest) is None
    assert combinations.find(unconcerned.digest) is not None
    assert registry.existing([held.digest, unconcerned.digest]) == {unconcerned.digest}


@pytest.mark.asyncio
async def test_the_least_recently_used_is_forgotten_and_freed(
    registry: Registry, combinations: Combinations, caches: Caches
) -> None:
    digests = []
    for weight in (0.1, 0.2, 0.1, 0.3):
        with registry.resolve_all(TENANT, [("style", weight)]) as held:
            digests.append(held.digest)
    assert caches.evicted == [digests[1]]
    assert [combinations.find(digest) is not None for digest in digests] == [True, False, True, True]


@pytest.mark.asyncio
async def test_a_use_of_each_is_counted(registry: Registry) -> None:
    await push(registry, "twice", "other", max_uses=2)
    for _ in range(2):
        with registry.resolve_all(TENANT, [("style", 1.0), ("twice", 0.5)]) as held:
            await held.confirm()
            await held.confirm()  # again is harmless
    with pytest.raises(AdapterNotFound):
        registry.resolve_all(TENANT, [("style", 1.0), ("twice", 0.5)])


class _Facts:
    def __init__(self, spec: AdapterSpec) -> None:
        self.spec, self.nbytes = spec, 1


def test_the_loader_combines_what_it_finds() -> None:
    known = Combination((("a" * 64, 0.5), ("b" * 64, 2.0)))
    asked: list[list[tuple[str, float]]] = []

    def combine(terms: list[tuple[_Facts, float]]) -> _Facts:
        asked.append([(weights.spec.digest, weight) for weights, weight in terms])
        return _Facts(spec_of(FILES["style"]))

    facts = {digest: _Facts(AdapterSpec(digest, "lora", None, False, {}, frozenset(), 1)) for digest, _ in known.terms}
    stored = _Facts(spec_of(FILES["facts"]))
    find, load = {known.digest: known}.get, facts.__getitem__
    loader = CombinationLoader(find, load, lambda _: stored, combine)  # type: ignore[arg-type]
    assert loader.load("a" * 64) is stored
    assert loader.load(known.digest) not in (stored, *facts.values())
    assert asked == [list(known.terms)]


ADAPTERS = [digit * 64 for digit in "0123"]


class _Books(RuleBasedStateMachine):
    """Holders, releases and removals in any order: what is held is known, what is not is bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Combinations(most_remembered=2)
        self.held: list[Combination] = []

    @rule(terms=st.dictionaries(st.sampled_from(ADAPTERS), st.sampled_from([0.5, 1.0]), min_size=1, max_size=2))
    def hold(self, terms: dict[str, float]) -> None:
        combination = Combination(tuple(sorted(terms.items())))
        self.books.hold(combination, "name", spec_of(FILES["style"]))
        self.held.append(combination)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ended = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        for digest in self.books.release(ended.digest):
            assert self.books.find(digest) is None
            assert digest not in {combination.digest for combination in self.held}

    @rule(adapter=st.sampled_from(ADAPTERS))
    def remove(self, adapter: str) -> None:
        if any(adapter in combination.digests for combination in self.held):
            return  # it is held with the combination
        gone = self.books.forget(adapter)
        assert all(self.books.find(digest) is None for digest in gone)
        assert all(adapter not in known.combination.digests for known in self.books._known.values())

    @invariant()
    def what_is_held_is_known(self) -> None:
        held = {combination.digest for combination in self.held}
        assert held <= self.books._known.keys()
        assert len(self.books._known) <= len(held) + 2


TestBooks = _Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

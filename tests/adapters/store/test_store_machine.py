"""The store against a model of it in a few dictionaries, over random histories with restarts."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loramux_adapters.errors import (
    AdapterConflict,
    AdapterCorrupt,
    AdapterInvalid,
    AdapterNotFound,
    QuotaExceeded,
    UploadOffset,
)
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import AdapterUpdate, DesiredState, Health, Quotas
from support.stores import (
    BASE,
    MODEL,
    OTHER_BASE,
    blob_files,
    content,
    digest_of,
    entries_of,
    manifest_of,
    quick_store,
    send,
    spec_of,
    stored,
)
from support.tallies import check_tallies

QUOTAS = Quotas(max_adapters=2, keep_versions=2, max_open_uploads=2)
CONTENTS = {digest_of(files): files for files in (content(f"v{number}", 300) for number in range(4))}

tenants = st.sampled_from(["red", "blue"])
names = st.sampled_from(["a", "b", "c", "x"])
aliases = st.sampled_from(["a", "x", "y"])
digests = st.sampled_from(sorted(CONTENTS))
conditions = st.none() | st.just("") | digests
upload_ids = st.sampled_from(["upload-1", "upload-2", "upload-3"])


class StoreMachine(RuleBasedStateMachine):
    """`kept` holds each name's versions, the newest last; everything else follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="loramux-machine-"))
        self.store: LocalStore = quick_store(self.root, QUOTAS)
        self.kept: dict[tuple[str, str], list[str]] = {}
        self.aliases: dict[tuple[str, str], str] = {}
        self.desired: dict[tuple[str, str], tuple[bool, bool]] = {}  # pinned, merged
        self.bases: dict[tuple[str, str], set[str]] = {}  # tenant, digest -> bases
        self.holds: Counter[str] = Counter()
        # -> name, digest, condition, received
        self.uploads: dict[tuple[str, str], tuple[str, str, str | None, int]] = {}
        self.corrupt: set[str] = set()  # digests; all tenants send the same files here

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @initialize()
    def start_empty(self) -> None:
        assert blob_files(self.root) == set()

    @rule(tenant=tenants, upload_id=upload_ids, name=names, digest=digests, condition=conditions)
    def begin(self, tenant: str, upload_id: str, name: str, digest: str, condition: str | None) -> None:
        manifest = manifest_of(name, CONTENTS[digest], if_version=condition and condition[:20])
        expected: type[Exception] | None = None
        open_here = [key for key in self.uploads if key[0] == tenant]
        if (tenant, name) in self.aliases:
            expected = AdapterConflict
        elif (tenant, name) not in self.kept and self.count(tenant) >= QUOTAS.max_adapters:
            expected = QuotaExceeded
        elif (tenant, upload_id) in self.uploads:
            if self.uploads[tenant, upload_id][:2] != (name, digest):
                expected = AdapterConflict
        elif len(open_here) >= QUOTAS.max_open_uploads:
            expected = QuotaExceeded
        if expected:
            with pytest.raises(expected):
                self.store.begin_upload(tenant, upload_id, manifest)
            return
        progress = self.store.begin_upload(tenant, upload_id, manifest)
        received = self.uploads.get((tenant, upload_id), (name, digest, condition, 0))[3]
        self.uploads[tenant, upload_id] = (name, digest, condition, received)  # the condition is the last one given
        assert {entry.file: entry.received for entry in progress.files}[MODEL] == received

    @rule(tenant=tenants, upload_id=upload_ids, offset=st.sampled_from([0, 100, 200, 300]))
    def write(self, tenant: str, upload_id: str, offset: int) -> None:
        if (tenant, upload_id) not in self.uploads:
            with pytest.raises(AdapterNotFound):
                self.store.write_chunk(tenant, upload_id, MODEL, offset, b"x")
            return
        name, digest, condition, received = self.uploads[tenant, upload_id]
        data = CONTENTS[digest][MODEL][offset : offset + 100]
        if offset != received:
            with pytest.raises(UploadOffset) as caught:
                self.store.write_chunk(tenant, upload_id, MODEL, offset, data)
            assert caught.value.received == received
            return
        assert self.store.write_chunk(tenant, upload_id, MODEL, offset, data) == received + len(data)
        self.uploads[tenant, upload_id] = (name, digest, condition, received + len(data))

    @rule(tenant=tenants, upload_id=upload_ids, base=st.sampled_from([BASE, OTHER_BASE]))
    def publish(self, tenant: str, upload_id: str, base: str) -> None:
        if (tenant, upload_id) not in self.uploads:
            with pytest.raises(AdapterNotFound):
                self.store.staged_files(tenant, upload_id)
            return
        name, digest, condition, received = self.uploads[tenant, upload_id]
        if received < 300:
            with pytest.raises(AdapterInvalid):
                self.store.staged_files(tenant, upload_id)
        send(self.store, upload_id, CONTENTS[digest], tenant=tenant)
        self.uploads[tenant, upload_id] = (name, digest, condition, 300)
        self.store.staged_files(tenant, upload_id)
        expected: type[Exception] | None = None
        current = self.kept.get((tenant, name), [""])[-1]
        if (tenant, name) in self.aliases or (condition is not None and current not in (condition, digest)):
            expected = AdapterConflict
        elif (tenant, name) not in self.kept and self.count(tenant) >= QUOTAS.max_adapters:
            expected = QuotaExceeded
        if expected:
            with pytest.raises(expected):
                self.store.publish(tenant, upload_id, spec_of(CONTENTS[digest]), base)
            return
        published = self.store.publish(tenant, upload_id, spec_of(CONTENTS[digest]), base)
        self.bases.setdefault((tenant, digest), set()).add(base)
        self.desired.setdefault((tenant, name), (False, False))
        versions = self.kept.setdefault((tenant, name), [])
        assert published.created == (versions[-1:] != [digest])
        assert published.record.digest == digest
        self.kept[tenant, name] = [*(d for d in versions if d != digest), digest][-QUOTAS.keep_versions :]
        del self.uploads[tenant, upload_id]
        self.corrupt.discard(digest)

    @rule(tenant=tenants, upload_id=upload_ids)
    def discard(self, tenant: str, upload_id: str) -> None:
        self.store.discard_upload(tenant, upload_id)
        self.uploads.pop((tenant, upload_id), None)

    @rule(tenant=tenants, name=names)
    def delete(self, tenant: str, name: str) -> None:
        if (tenant, name) not in self.kept:
            with pytest.raises(AdapterNotFound):
                self.store.delete(tenant, name)
            return
        self.store.delete(tenant, name)
        del self.kept[tenant, name]
        del self.desired[tenant, name]
        self.aliases = {key: n for key, n in self.aliases.items() if (key[0], n) != (tenant, name)}

    @rule(tenant=tenants, name=names, alias=aliases, add=st.booleans())
    def alias(self, tenant: str, name: str, alias: str, add: bool) -> None:
        change = AdapterUpdate(add_aliases=(alias,)) if add else AdapterUpdate(remove_aliases=(alias,))
        if (tenant, name) not in self.kept:
            with pytest.raises(AdapterNotFound):
                self.store.update(tenant, name, change)
        elif add and (tenant, alias) in self.kept:
            with pytest.raises(AdapterConflict):
                self.store.update(tenant, name, change)
        else:
            self.store.update(tenant, name, change)
            if add:
                self.aliases[tenant, alias] = name
            elif self.aliases.get((tenant, alias)) == name:
                del self.aliases[tenant, alias]

    @rule(tenant=tenants, name=names, digest=digests, condition=st.none() | digests)
    def switch(self, tenant: str, name: str, digest: str, condition: str | None) -> None:
        change = AdapterUpdate(version=digest[:20], if_version=(condition or "")[:20])
        versions = self.kept.get((tenant, name), [])
        reachable = {each for (owner, _), kept in self.kept.items() if owner == tenant for each in kept}
        expected: type[Exception] | None = None
        if not versions or (digest not in reachable and condition in (None, versions[-1])):
            expected = AdapterNotFound
        elif condition not in (None, versions[-1]):
            expected = AdapterConflict
        elif digest in self.corrupt:
            expected = AdapterCorrupt
        if expected:
            with pytest.raises(expected):
                self.store.update(tenant, name, change)
            return
        record = self.store.update(tenant, name, change)
        self.kept[tenant, name] = [*(d for d in versions if d != digest), digest][-QUOTAS.keep_versions :]
        assert list(record.versions) == self.kept[tenant, name][::-1]

    @rule(tenant=tenants, name=names, pinned=st.none() | st.booleans(), merged=st.none() | st.booleans())
    def desire(self, tenant: str, name: str, pinned: bool | None, merged: bool | None) -> None:
        change = AdapterUpdate(pinned=pinned, merge=merged)
        if (tenant, name) not in self.kept:
            with pytest.raises(AdapterNotFound):
                self.store.update(tenant, name, change)
            return
        before = self.desired[tenant, name]
        now = (before[0] if pinned is None else pinned, before[1] if merged is None else merged)
        record = self.store.update(tenant, name, change)
        assert (record.pinned, record.merge) == now
        self.desired[tenant, name] = now

    @rule(tenant=tenants, reference=st.one_of(names, aliases), prefix=st.one_of(st.just(""), digests))
    def acquire(self, tenant: str, reference: str, prefix: str) -> None:
        name = self.aliases.get((tenant, reference), reference)
        versions = self.kept.get((tenant, name), [])
        wanted = [digest for digest in versions if digest.startswith(prefix)] if prefix else versions[-1:]
        if not wanted:
            with pytest.raises(AdapterNotFound):
                self.store.acquire(tenant, reference, prefix)
        elif wanted[0] in self.corrupt:
            with pytest.raises(AdapterCorrupt):
                self.store.acquire(tenant, reference, prefix)
        else:
            version = self.store.acquire(tenant, reference, prefix)
            assert (version.id.name, version.digest) == (name, wanted[0])
            assert version.spec == spec_of(CONTENTS[version.digest])
            self.holds[version.digest] += 1

    @rule(digest=digests)
    def release(self, digest: str) -> None:
        if not self.holds[digest]:
            with pytest.raises(RuntimeError):
                self.store.release(digest)
            return
        self.holds[digest] -= 1
        if self.store.release(digest):
            assert not self.holds[digest]
            self.store.collect()

    @rule(digest=digests)
    def rot(self, digest: str) -> None:
        if digest in self.held() and digest not in self.corrupt:
            sha256 = next(entry.sha256 for entry in entries_of(CONTENTS[digest]) if entry.file == MODEL)
            (self.root / "blobs" / sha256[:2] / sha256).write_bytes(b"rotten")
            with pytest.raises(AdapterCorrupt):
                self.store.files(digest)
            self.corrupt.add(digest)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = quick_store(self.root, QUOTAS)
        self.holds.clear()

    @invariant()
    def tallies_are_what_a_count_gives(self) -> None:
        check_tallies(self.root)

    @invariant()
    def bytes_are_those_of_names_and_pins(self) -> None:
        held = self.held()
        self.corrupt &= held
        assert blob_files(self.root) == {entry.sha256 for digest in held for entry in entries_of(CONTENTS[digest])}
        for digest in CONTENTS:
            if digest in self.corrupt:
                with pytest.raises(AdapterCorrupt):
                    self.store.files(digest)
            elif digest in held:
                assert stored(self.store, digest) == CONTENTS[digest]
            else:
                with pytest.raises(AdapterNotFound):
                    self.store.files(digest)

    @invariant()
    def desired_state_is_that_of_names_for_what_they_point_at(self) -> None:
        entries = [(self.kept[name][-1], *desired) for name, desired in self.desired.items()]
        assert self.store.desired_state() == DesiredState(
            frozenset(digest for digest, pinned, _ in entries if pinned),
            frozenset(digest for digest, _, merged in entries if merged),
        )

    @invariant()
    def each_copy_knows_the_bases_it_was_published_for(self) -> None:
        for tenant, digest in list(self.bases):
            kept = any(digest in versions for (t, _), versions in self.kept.items() if t == tenant)
            if not kept and not self.holds[digest]:
                del self.bases[tenant, digest]
        for digest in CONTENTS:
            bases = {base for (_, d), known in self.bases.items() if d == digest for base in known}
            assert self.store.accepted_bases(digest) == bases
        for tenant in ("red", "blue"):
            for record in self.store.list(tenant).records:
                assert record.bases == self.store.accepted_bases(record.digest)

    @invariant()
    def lists_show_the_names(self) -> None:
        for tenant in ("red", "blue"):
            records = self.store.list(tenant).records
            shown = {record.id.name: (record.digest, record.aliases, record.health) for record in records}
            assert shown == {
                name: (
                    versions[-1],
                    tuple(sorted(a for (t, a), n in self.aliases.items() if (t, n) == (tenant, name))),
                    Health.CORRUPT if versions[-1] in self.corrupt else Health.OK,
                )
                for (t, name), versions in self.kept.items()
                if t == tenant
            }

    def held(self) -> set[str]:
        """Digests that a name keeps or that are held."""
        return {digest for versions in self.kept.values() for digest in versions} | set(+self.holds)

    def count(self, tenant: str) -> int:
        return sum(key[0] == tenant for key in self.kept)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

"""kill -9 at every step of publish, alias switch, use, expiry and delete, of adapters of every kind, and at random.

After each kill: every acknowledged change is there with its bytes, kind, end and alias, what was under way is old or
new, no file is left over, and the upload that was cut can be completed. `KILL_ROUNDS` makes it longer than the suite
has time for: in each round every step meets another kind.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.store.local import LocalStore
from support.corpus import KINDS
from support.crash_server import QUOTAS, Clock, Operation, StoredAdapter, load_corpus, perform
from support.names_model import NamesModel, look
from support.processes import environment
from support.stores import TENANT, blob_files, entries_of, quick_store

ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
KILLED = -signal.SIGKILL
TTL = 1000.0
WEEKS = 20 * 86_400.0  # in lost/ nothing stays so long
OF_THE_STORE = {"catalog.sqlite3", "catalog.sqlite3-wal", "catalog.sqlite3-shm", "lock", "published.jsonl", "reserve"}
CASES = (*KINDS, "max_uses", "ttl")  # the last two: adapters that end


class CrashServer:
    """Runs orders and keeps what their outcome may be: the names before and after the operation that was cut."""

    def __init__(self, root: Path, corpus: Path) -> None:
        self.root = root
        self.corpus = load_corpus(corpus)
        self.clock = Clock()
        self.kills: Counter[str] = Counter()
        self.resumed = 0
        self.names = NamesModel()
        self._numbers = itertools.count()
        self._tried: Operation | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.crash_server", str(corpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(),
        )

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def publish(self, name: str, adapter: str, *, ttl: float | None = None, max_uses: int | None = None) -> Operation:
        return Operation("publish", name, adapter, next(self._numbers), ttl, max_uses)

    def do(self, *operations: Operation) -> None:
        """What comes before an order, without a kill."""
        with self._open() as store:
            for operation in operations:
                now = self.clock()
                perform(store, self.corpus, operation, self.clock)
                self.names = self.names.after(operation, now)

    def run(
        self,
        operations: list[Operation],
        case: str = "",
        *,
        kill_at: int | None = None,
        kill_after: float | None = None,
    ) -> bool:
        """One order; whether the child was killed before its end."""
        assert self._process.stdin
        assert self._process.stdout
        order = {"root": str(self.root), "ahead": self.clock.ahead, "kill_at": kill_at}
        order["operations"] = [vars(operation) for operation in operations]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._tried = None
        for line in self._process.stdout:
            word, *rest = line.split()
            if word == "pid" and kill_after is not None:
                time.sleep(kill_after)
                os.kill(int(rest[0]), signal.SIGKILL)
            elif word == "try":
                self._tried = operations[int(rest[0])]
                self._before, self._now = self.names, self.clock()
                self.clock.ahead += self._tried.seconds
            elif word == "ack":
                assert self._tried
                self.names, self._tried = self.names.after(self._tried, self._now), None
            elif word == "ended":
                assert int(rest[0]) in (0, KILLED)
                killed = int(rest[0]) == KILLED
                self.kills[case] += killed
                return killed
            elif word == "error":
                pytest.fail(line)
        pytest.fail("the crash server itself ended")

    def check(self) -> None:
        """Reopen as a new server would, and look at everything."""
        with self._open() as store:
            found = self._look(store)
            done = self.names if self._tried is None else self.names.after(self._tried, self._now)
            assert found in (self.names.at(self.clock()), done)
            self._check_files(found)
            if self._tried and self._tried.what == "publish":
                if found != done:
                    self._complete(store, self._tried)
                    assert self._look(store) == done
                    self._check_files(done)
                    found = done
                store.discard_upload(TENANT, self._tried.upload_id)
            assert not list((self.root / "uploads" / TENANT).glob("*"))
        self.names = done if found == done else self.names.at(self.clock())

    def check_nothing_is_left(self) -> None:
        """With its last name the data directory is as it was at the start."""
        self.do(*(Operation("delete", name) for name in self.names.names))
        self.clock.ahead += WEEKS
        self._open().close()
        found = {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}
        assert found <= OF_THE_STORE
        assert (self.root / "published.jsonl").read_bytes() == b""

    def _open(self) -> LocalStore:
        return quick_store(self.root, QUOTAS, clock=self.clock)

    def _look(self, store: LocalStore) -> NamesModel:
        return look(store, self.corpus, self.clock())

    def _check_files(self, names: NamesModel) -> None:
        adapters = [self._adapter(each.adapter) for each in names.names.values()]
        assert blob_files(self.root) == {entry.sha256 for adapter in adapters for entry in entries_of(adapter.files)}

    def _adapter(self, name: str) -> StoredAdapter:
        return self.corpus[name]

    def _complete(self, store: LocalStore, operation: Operation) -> None:
        """Resume the cut upload from what is on the disk."""
        directory = self.root / "uploads" / TENANT / operation.upload_id
        parts = [directory / file for file in self._adapter(operation.adapter).files]
        self.resumed += any(part.exists() and part.stat().st_size for part in parts)
        self._now = self.clock()
        perform(store, self.corpus, operation, self.clock)


@pytest.fixture
def server(tmp_path: Path, corpus: Path) -> Iterator[CrashServer]:
    LocalStore(tmp_path, QUOTAS).close()
    server = CrashServer(tmp_path, corpus)
    yield server
    server.close()


def order_for(server: CrashServer, case: str) -> list[Operation]:
    """Brings a store to where every operation of the order has something to replace, move or remove."""
    server.do(*(Operation("delete", name) for name in server.names.names))
    if case == "ttl":
        server.do(server.publish("a", "lora-0", ttl=TTL, max_uses=5), Operation("alias", "a", alias="live"))
        return [server.publish("a", "lora-1", ttl=2 * TTL, max_uses=7), Operation("expire", seconds=3 * TTL)]
    if case == "max_uses":
        server.do(server.publish("a", "prompt-0", max_uses=5), server.publish("b", "dora-0"))
        server.do(Operation("alias", "b", alias="live"))
        use = Operation("use", "a")
        return [server.publish("a", "prompt-1", max_uses=2), Operation("alias", "a", alias="live"), use, use]
    server.do(server.publish("a", f"{case}-0"), server.publish("b", "lora-0"), Operation("alias", "b", alias="live"))
    return [server.publish("a", f"{case}-1"), Operation("alias", "a", alias="live"), Operation("delete", "b")]


@pytest.mark.slow
@pytest.mark.timeout(300 * ROUNDS)
def test_a_kill_at_every_step_leaves_old_or_new_and_nothing_half(server: CrashServer) -> None:
    for round_ in range(ROUNDS):
        survivors = 0
        # The order's own start and sweep are killed as well. No case has so many steps once all have survived.
        for step in itertools.count(1):
            case = CASES[(step + round_) % len(CASES)]
            survivors = 0 if server.run(order_for(server, case), case, kill_at=step) else survivors + 1
            server.check()
            if survivors == len(CASES):
                break
    server.check_nothing_is_left()
    print(f"{sum(server.kills.values())} kills, {server.resumed} uploads resumed: {dict(server.kills)}")
    assert server.kills.keys() == set(CASES)
    assert min(server.kills.values()) >= 5 * ROUNDS
    assert server.resumed >= 20 * ROUNDS


def random_operations(server: CrashServer, chance: random.Random, count: int) -> list[Operation]:
    """Such as a store does not refuse, whatever kind comes after which."""
    names, operations = server.names, list[Operation]()
    while len(operations) < count:
        name = chance.choice("abc")
        if name not in names.names or chance.random() < 0.6:
            operation = server.publish(name, f"{chance.choice(KINDS)}-{chance.randrange(2)}")
        elif chance.random() < 0.5:
            operation = Operation("alias", name, alias="live")
        else:
            operation = Operation("delete", name)
        operations.append(operation)
        names = names.after(operation, 0.0)
    return operations


@pytest.mark.slow
def test_kills_at_random_moments(server: CrashServer) -> None:
    chance = random.Random(20_24)
    for _ in range(60):
        assert server.run(random_operations(server, chance, 500), kill_after=chance.uniform(0.0, 0.12))
        server.check()
    server.check_nothing_is_left()
    assert sum(server.kills.values()) == 60
    assert server.resumed > 5  # some of them hit work that was well under way

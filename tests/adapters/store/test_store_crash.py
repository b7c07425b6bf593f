"""kill -9 at every step of publish and delete, and at random moments.

After each kill: every acknowledged change is there with intact bytes, what was under way is old or new,
no file is left over, and the upload that was cut can be completed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.store.local import LocalStore
from support.crash_server import NAMES, QUOTAS, files_of, upload_id_of
from support.processes import environment
from support.stores import BASE, TENANT, blob_files, digest_of, entries_of, manifest_of, send, spec_of, stored

KILLED = -signal.SIGKILL


class CrashServer:
    """Runs orders and keeps what their outcome may be: per name the acknowledged number, or the one tried too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.next = 1
        self.kills = 0
        self.resumed = 0
        self.possible: dict[str, set[int | None]] = {name: {None} for name in NAMES}
        self.tried: tuple[str, int] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.crash_server"],
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

    def run(
        self, *, rounds: int, delete_every: int = 4, kill_at: int | None = None, kill_after: float | None = None
    ) -> bool:
        """One order; whether the child was killed before its end."""
        assert self._process.stdin
        assert self._process.stdout
        order = {"root": str(self.root), "first": self.next, "rounds": rounds, "delete_every": delete_every}
        order["kill_at"] = kill_at
        self._process.stdin.write(json.dumps(order) + "\n")
        self.tried = None
        for line in self._process.stdout:
            word, *rest = line.split()
            if word == "pid" and kill_after is not None:
                time.sleep(kill_after)
                os.kill(int(rest[0]), signal.SIGKILL)
            elif word in ("try", "ack"):
                self._note(word, *rest)
            elif word == "ended":
                assert int(rest[0]) in (0, KILLED)
                killed = int(rest[0]) == KILLED
                self.kills += killed
                return killed
            elif word == "error":
                pytest.fail(line)
        pytest.fail("the crash server itself ended")

    def _note(self, word: str, operation: str, name: str, number: str) -> None:
        outcome = int(number) if operation == "publish" else None
        if word == "try":
            self.possible[name].add(outcome)
            self.next = int(number) + 1
            self.tried = (name, int(number)) if operation == "publish" else None
        else:
            self.possible[name] = {outcome}
            self.tried = None

    def check(self) -> None:
        """Reopen as a new server would, and look at everything."""
        with LocalStore(self.root, QUOTAS) as store:
            actual = {name: self._current(store, name) for name in NAMES}
            for name, number in actual.items():
                assert number in self.possible[name], f"{name}: {number} is none of {self.possible[name]}"
            self._check_files(actual)
            if self.tried and actual[self.tried[0]] != self.tried[1]:
                actual[self.tried[0]] = self._complete(store, *self.tried)
                self._check_files(actual)
            elif self.tried:
                store.discard_upload(TENANT, upload_id_of(self.tried[1]))
            assert not list((self.root / "uploads" / TENANT).glob("*"))
        self.possible = {name: {number} for name, number in actual.items()}

    def _current(self, store: LocalStore, name: str) -> int | None:
        try:
            digest = store.get(TENANT, name).digest
        except AdapterNotFound:
            return None
        number = next(n for n in range(self.next) if digest_of(files_of(n)) == digest)
        assert stored(store, digest) == files_of(number)
        return number

    def _check_files(self, actual: dict[str, int | None]) -> None:
        numbers = [number for number in actual.values() if number is not None]
        assert blob_files(self.root) == {entry.sha256 for n in numbers for entry in entries_of(files_of(n))}

    def _complete(self, store: LocalStore, name: str, number: int) -> int:
        """Resume the cut upload from what the store says is received."""
        files = files_of(number)
        progress = store.begin_upload(TENANT, upload_id_of(number), manifest_of(name, files))
        self.resumed += any(entry.received for entry in progress.files)
        for entry in progress.files:
            part = self.root / "uploads" / TENANT / upload_id_of(number) / entry.file
            assert entry.received == (part.stat().st_size if part.exists() else 0)
        send(store, upload_id_of(number), files)
        store.staged_files(TENANT, upload_id_of(number))
        assert store.publish(TENANT, upload_id_of(number), spec_of(files), BASE).record.digest == digest_of(files)
        return number


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CrashServer]:
    LocalStore(tmp_path, QUOTAS).close()
    server = CrashServer(tmp_path)
    yield server
    server.close()


@pytest.mark.slow
def test_a_kill_at_every_step_leaves_old_or_new_and_nothing_half(server: CrashServer) -> None:
    server.run(rounds=3)
    server.check()
    # One publish over an old version and one delete; the order's own start and sweep are killed as well.
    step = 1
    while server.run(rounds=1, delete_every=1, kill_at=step):
        server.check()
        step += 1
    server.check()
    assert server.kills >= 80
    assert server.resumed >= 20


@pytest.mark.slow
def test_kills_at_random_moments(server: CrashServer) -> None:
    chance = random.Random(20_24)
    for _ in range(60):
        assert server.run(rounds=10_000, kill_after=chance.uniform(0.0, 0.12))
        server.check()
    assert server.kills == 60
    assert server.next > 20  # some of them hit work that was well under way

"""kill -9 of a real gRPC server, fifty times and more, in the midst of uploads of adapters of every kind.

After each restart: every acknowledged adapter is there with intact bytes, its kind and its end, no torn one is visible,
each name and alias points at its old or its new version; and uploaders go on where they were cut. `KILL_ROUNDS` makes
it longer than the suite has time for.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loramux import Client, upload
from loramux.errors import LoramuxError, NotFound, Unavailable
from loramux.retry import NO_RETRY
from loramux.types import TransferProgress
from loramux_adapters.spec import AdapterSpec
from support.corpus import make_corpus, write_specs
from support.crash_server import load_corpus
from support.processes import environment

KILLS = int(os.environ.get("KILL_ROUNDS", "55"))
UPLOADERS = 4
EPHEMERAL = 1  # the number of the uploader whose versions end by themselves, long after the test
ENDS: dict[str, int] = {"ttl": 100_000, "max_uses": 1000}
ALIAS = "live"
NEWEST = 2  # acknowledged versions that must stay reachable; the store keeps three
CHUNK_BYTES = 16 << 10
PUBLISH_SECONDS = 0.03

Version = int | None  # None: deleted, or never there


class Server:
    """One life after the other over one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.killable_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(),
        )
        self._pid = 0
        self._expect("here")

    def start(self) -> str:
        """Returns the address of the next life."""
        assert self._process.stdin
        self._process.stdin.write(f"{self._data_dir}\n")
        self._pid = int(self._expect("pid"))
        return self._expect("ready")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        assert int(self._expect("ended")) == -signal.SIGKILL
        self._pid = 0

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        if self._pid:
            self.kill()
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def _expect(self, word: str) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line.startswith(word), f"{word} expected, not {line!r}"
        return line.partition(" ")[2].strip()


@dataclass
class Uploader:
    """Replaces and deletes one name for ever. What it was told and what it does not know is kept for the checks."""

    name: str
    directories: list[Path]  # of many kinds, taken in turn
    chance: random.Random
    ends: dict[str, int]
    acknowledged: list[Version] = field(default_factory=lambda: [None])
    trying: Version = None  # what the name may be as well, while `is_trying`
    is_trying: bool = False
    resumed: int = 0
    done: int = 0

    def run(self, client: Client, stop: threading.Event, committing: threading.Event) -> None:
        """Go on until the server dies; an operation it cut is taken up again in its next life.

        Sets `committing` whenever the last byte of an upload was sent.
        """
        try:
            while not stop.is_set():
                if not self.is_trying:
                    self.trying = self._choose()
                    self.is_trying = True
                self._operate(client, committing)
                self.acknowledged.append(self.trying)
                self.is_trying = False
                self.done += 1
        except Unavailable:
            return

    def _choose(self) -> Version:
        current = self.acknowledged[-1]
        if current is not None and self.chance.random() < 0.15:
            return None
        return self.chance.choice([version for version in range(len(self.directories)) if version != current])

    def _operate(self, client: Client, committing: threading.Event) -> None:
        def note(progress: TransferProgress) -> None:
            if progress.done == progress.total:
                committing.set()

        if self.trying is not None:
            pushed = client.push(self.directories[self.trying], self.name, progress=note, **self.ends)
            self.resumed += pushed.resumed_bytes > 0
            return
        try:
            client.delete(self.name)
        except NotFound:
            return  # the life before did it and could not say so


@dataclass
class AliasSwitcher:
    """Points an alias at one of two names and at the other, for ever."""

    names: tuple[str, str]
    acknowledged: str
    trying: str
    done: int = 0

    def run(self, client: Client, stop: threading.Event) -> None:
        """Go on until the server dies."""
        try:
            while not stop.wait(0.01):  # uploads are what most of the time is for
                self.trying = next(name for name in self.names if name != self.acknowledged)
                client.update(self.trying, add_aliases=[ALIAS])
                self.acknowledged = self.trying
                self.done += 1
        except Unavailable:
            return

    def check(self, client: Client) -> None:
        """After a restart."""
        assert client.adapter(ALIAS).name in (self.acknowledged, self.trying)
        self.acknowledged = client.adapter(ALIAS).name
        assert [client.adapter(name).aliases for name in self.names].count((ALIAS,)) == 1


class NamesChecker:
    """What must be true of all names after each restart."""

    def __init__(self, uploaders: list[Uploader], specs: dict[Path, AdapterSpec], fixed: tuple[str, ...]) -> None:
        self._uploaders = uploaders
        self._specs = specs
        self._fixed = fixed
        self._kinds = {spec.digest: spec.kind for spec in specs.values()}
        self.checked: Counter[str] = Counter()

    def check(self, client: Client, scratch: Path) -> None:
        visible = {adapter.name: adapter for adapter in client.adapters()}
        assert visible.keys() <= {*self._fixed, *(uploader.name for uploader in self._uploaders)}
        for uploader in self._uploaders:
            adapter = visible.get(uploader.name)
            expected = {self._digest(uploader, uploader.acknowledged[-1])}
            if uploader.is_trying:
                expected.add(self._digest(uploader, uploader.trying))
            actual = None if adapter is None else adapter.digest
            assert actual in expected, f"{uploader.name}: {actual} is neither its old nor its new version"
            if adapter is not None:
                assert adapter.health == "ok"
                assert adapter.kind == self._kinds[adapter.digest]
                assert adapter.uses_left == uploader.ends.get("max_uses")
                assert (adapter.expires is not None) == ("ttl" in uploader.ends)
            if uploader.is_trying and actual == self._digest(uploader, uploader.trying):
                uploader.acknowledged.append(uploader.trying)  # done, only not told
                uploader.is_trying = False
            if actual is not None:
                for version in self._kept(uploader):
                    self._check_bytes(client, uploader, version, scratch)

    def _digest(self, uploader: Uploader, version: Version) -> str | None:
        return None if version is None else self._specs[uploader.directories[version]].digest

    def _kept(self, uploader: Uploader) -> set[int]:
        """Of the versions since the last deletion, those which `name@digest` must reach."""
        since: list[int] = []
        for version in uploader.acknowledged:
            since = [] if version is None else [*since, version]
        return set(since[-NEWEST:])

    def _check_bytes(self, client: Client, uploader: Uploader, version: int, scratch: Path) -> None:
        source = uploader.directories[version]
        digest = self._specs[source].digest
        back = scratch / f"{self.checked.total()}"
        pulled = client.pull(f"{uploader.name}@{digest[:16]}", back)
        assert pulled.digest == digest
        assert {file.name: file.read_bytes() for file in back.iterdir()} == {
            file.name: file.read_bytes() for file in source.iterdir()
        }
        self.checked[self._specs[source].kind] += 1


@pytest.mark.slow
@pytest.mark.timeout(300 + 5 * KILLS)
def test_killed_in_the_midst_of_uploads_the_server_comes_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", CHUNK_BYTES)  # many messages, so that kills fall between them
    corpus = make_corpus(tmp_path)
    write_specs(tmp_path, corpus)
    specs = {corpus[name]: adapter.spec for name, adapter in load_corpus(tmp_path).items()}
    directories = list(corpus.values())
    chance = random.Random(26)
    uploaders = [
        Uploader(
            f"name-{index}",
            directories[index::UPLOADERS],
            random.Random(index),
            ENDS if index == EPHEMERAL else {},
        )
        for index in range(UPLOADERS)
    ]
    switcher = AliasSwitcher(("fixed-0", "fixed-1"), "fixed-0", "fixed-0")
    checker = NamesChecker(uploaders, specs, switcher.names)
    server = Server(tmp_path / "data")
    unexpected: list[LoramuxError] = []

    def work(run: Callable[..., None], *arguments: object) -> None:
        try:
            run(*arguments)
        except LoramuxError as error:
            unexpected.append(error)

    try:
        for life in range(KILLS + 1):
            address = server.start()
            with Client(address, retry=NO_RETRY) as client:
                if life == 0:
                    for name in switcher.names:
                        client.push(directories[0], name)
                    client.update(switcher.acknowledged, add_aliases=[ALIAS])
                checker.check(client, tmp_path / f"back-{life}")
                switcher.check(client)
                if life == KILLS:
                    break
                stop, committing = threading.Event(), threading.Event()
                calls = [(uploader.run, client, stop, committing) for uploader in uploaders]
                threads = [threading.Thread(target=work, args=each) for each in (*calls, (switcher.run, client, stop))]
                for thread in threads:
                    thread.start()
                time.sleep(chance.uniform(0.02, 0.25))
                if life % 3:  # most of an upload's time is in its chunks, most of what can go wrong in its publish
                    committing.clear()
                    committing.wait(5)
                    time.sleep(chance.uniform(0.0, PUBLISH_SECONDS))
                server.kill()
                stop.set()
                for thread in threads:
                    thread.join(20)
                    assert not thread.is_alive()
                assert unexpected == []
    finally:
        server.close()
    resumed = sum(uploader.resumed for uploader in uploaders)
    print(f"{KILLS} kills, {resumed} uploads resumed, {switcher.done} aliases moved, compared: {dict(checker.checked)}")
    assert checker.checked.total() >= KILLS  # adapters were there to be looked at
    assert checker.checked.keys() == {spec.kind for spec in specs.values()}
    assert sum(uploader.done for uploader in uploaders) >= KILLS
    assert resumed >= KILLS // 5
    assert switcher.done >= KILLS

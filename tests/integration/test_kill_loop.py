"""kill -9 of a real gRPC server, fifty times and more, in the midst of uploads.

After each restart: every acknowledged adapter is there with intact bytes, no torn one is visible, each name points at
its old or its new version; and uploaders go on where they were cut.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loramux import Client, upload
from loramux.errors import LoramuxError, NotFound, Unavailable
from loramux.retry import NO_RETRY
from loramux.types import TransferProgress
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from support.processes import environment
from support.tiny import load_tiny
from support.tiny_adapters import tiny_files, write_files

KILLS = 55
UPLOADERS = 4
VERSIONS = 6  # contents of each name, taken in turn
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
    directories: list[Path]
    chance: random.Random
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
            self.resumed += client.push(self.directories[self.trying], self.name, progress=note).resumed_bytes > 0
            return
        try:
            client.delete(self.name)
        except NotFound:
            return  # the life before did it and could not say so


class NamesChecker:
    """What must be true of all names after each restart."""

    def __init__(self, uploaders: list[Uploader], digests: dict[Path, str]) -> None:
        self._uploaders = uploaders
        self._digests = digests
        self.checked = 0

    def check(self, client: Client, scratch: Path) -> None:
        visible = {adapter.name: adapter for adapter in client.adapters()}
        assert visible.keys() <= {uploader.name for uploader in self._uploaders}
        for uploader in self._uploaders:
            adapter = visible.get(uploader.name)
            expected = {self._digest(uploader, uploader.acknowledged[-1])}
            if uploader.is_trying:
                expected.add(self._digest(uploader, uploader.trying))
            actual = None if adapter is None else adapter.digest
            assert actual in expected, f"{uploader.name}: {actual} is neither its old nor its new version"
            assert adapter is None or adapter.health == "ok"
            if uploader.is_trying and actual == self._digest(uploader, uploader.trying):
                uploader.acknowledged.append(uploader.trying)  # done, only not told
                uploader.is_trying = False
            if actual is not None:
                for version in self._kept(uploader):
                    self._check_bytes(client, uploader, version, scratch)

    def _digest(self, uploader: Uploader, version: Version) -> str | None:
        return None if version is None else self._digests[uploader.directories[version]]

    def _kept(self, uploader: Uploader) -> set[int]:
        """Of the versions since the last deletion, those which `name@digest` must reach."""
        since: list[int] = []
        for version in uploader.acknowledged:
            since = [] if version is None else [*since, version]
        return set(since[-NEWEST:])

    def _check_bytes(self, client: Client, uploader: Uploader, version: int, scratch: Path) -> None:
        source = uploader.directories[version]
        digest = self._digests[source]
        back = scratch / f"{self.checked}"
        pulled = client.pull(f"{uploader.name}@{digest[:16]}", back)
        assert pulled.digest == digest
        for file in source.iterdir():
            assert (back / file.name).read_bytes() == file.read_bytes()
        self.checked += 1


def _contents(root: Path) -> Iterator[Path]:
    """Directories of adapters that differ in size, so that some uploads are long and some are short."""
    for index in range(UPLOADERS * VERSIONS):
        files = tiny_files(index, rank=(2, 8, 24, 48)[index % 4])
        yield write_files(root / f"content-{index}", files)


@pytest.mark.slow
def test_killed_in_the_midst_of_uploads_the_server_comes_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNK_BYTES", CHUNK_BYTES)  # many messages, so that kills fall between them
    base = load_tiny().spec
    directories = list(_contents(tmp_path))
    digests = {
        path: formats.read({file.name: file for file in path.iterdir()}, base, ReadLimits()).spec.digest
        for path in directories
    }
    chance = random.Random(26)
    uploaders = [
        Uploader(f"name-{index}", directories[index::UPLOADERS], random.Random(index)) for index in range(UPLOADERS)
    ]
    checker = NamesChecker(uploaders, digests)
    server = Server(tmp_path / "data")
    unexpected: list[LoramuxError] = []

    def work(uploader: Uploader, client: Client, stop: threading.Event, committing: threading.Event) -> None:
        try:
            uploader.run(client, stop, committing)
        except LoramuxError as error:
            unexpected.append(error)

    try:
        for life in range(KILLS + 1):
            address = server.start()
            with Client(address, retry=NO_RETRY) as client:
                checker.check(client, tmp_path / f"back-{life}")
                if life == KILLS:
                    break
                stop, committing = threading.Event(), threading.Event()
                threads = [threading.Thread(target=work, args=(each, client, stop, committing)) for each in uploaders]
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
    assert checker.checked >= KILLS  # adapters were there to be looked at
    assert sum(uploader.done for uploader in uploaders) >= KILLS
    assert sum(uploader.resumed for uploader in uploaders) >= KILLS // 5

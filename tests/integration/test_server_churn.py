"""Adapters of every kind are pushed, replaced, aliased, merged, pinned and deleted, and end by themselves, while
streams run on them.

Every stream equals its solo run on the version it started with, and afterwards nothing is held. `CHURN_SECONDS`
makes it longer than the suite has time for.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loramux import Client
from loramux.errors import LoramuxError, NotFound
from loramux.local_server import LocalServer
from support.corpus import INVOCATION, KINDS, VERSIONS, make_corpus
from support.live import GREEDY, metric, until, until_idle

SECONDS = float(os.environ.get("CHURN_SECONDS", "6"))
STREAMS = 32 if SECONDS > 30 else 16
OPERATORS = 2
OPERATIONS_PER_SECOND = 20
TOKENS = 40
PROMPT = [5, 17, 4, *INVOCATION, 33, 8]
EPHEMERAL = {"uses": {"max_uses": 20}, "time": {"ttl": 1.0}}
"""Names whose adapters end by themselves."""
NAMES = (*KINDS, *EPHEMERAL)
OPTIONS = {
    "dtype": "float32",
    "kv_bytes": "64MiB",
    "adapter_device_bytes": "64MiB",
    "max_running": str(STREAMS),
    "max_batch_tokens": "512",
    "readiness_seconds": "0.2",
    "drain_seconds": "20",
}
HELD = {
    "loramux_adapter_leases", "loramux_adapters", "loramux_adapters_bytes", "loramux_merged_adapters",
    "loramux_merged_bytes", "loramux_pinned_adapters",
}  # fmt: skip
"""Metrics that are 0 where there is no adapter."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of each kind."""
    return make_corpus(tmp_path_factory.mktemp("churn"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Without any adapter, and with a place in the batch for each stream."""
    root = tmp_path_factory.mktemp("server")
    with LocalServer({**OPTIONS, "data_dir": str(root / "data")}, log=root / "log") as running:
        yield running


@pytest.fixture
def solo(client: Client, server: LocalServer, directories: dict[str, Path]) -> Iterator[dict[str, list[int]]]:
    """Digest -> the tokens of each version, asked alone."""
    answers = {}
    for name, directory in directories.items():
        digest = client.push(directory, f"solo-{name}").adapter.digest
        answers[digest] = ask(client, f"solo-{name}")[1]
    yield answers
    for name in directories:
        client.delete(f"solo-{name}")
    until_idle(server)
    until(lambda: nothing_is_held(server), "no adapter takes a slot, a lease or a byte")


def nothing_is_held(server: LocalServer) -> bool:
    return all(value == 0 for name in HELD for value in metric(server, name).values())


def ask(client: Client, adapter: str) -> tuple[str, list[int]]:
    """The version that answered, and its tokens."""
    options = {**GREEDY, "max_tokens": TOKENS, "return_token_ids": True}
    answer = client.generate(token_ids=PROMPT, adapter=adapter, **options)
    assert answer.prompt.adapter_digest is not None
    return answer.prompt.adapter_digest, list(answer.choices[0].token_ids)


class Churn:
    """Streams and operations beside each other until the time is over."""

    def __init__(self, address: str, directories: dict[str, Path], solo: dict[str, list[int]]) -> None:
        self._address, self._directories, self._solo = address, directories, solo
        self._end = time.monotonic() + SECONDS
        self.counts: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # by name
        self.wrong: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(STREAMS)]
        threads += [threading.Thread(target=self._operate, args=(number,)) for number in range(OPERATORS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 120)
            assert not thread.is_alive()

    def push(self, client: Client, name: str, version: int) -> None:
        """A version to a name; of those that end, any kind's."""
        kind = KINDS[self.counts["push"] % len(KINDS)] if name in EPHEMERAL else name
        client.push(self._directories[f"{kind}-{version}"], f"churn-{name}", **EPHEMERAL.get(name, {}))

    def _stream(self, number: int) -> None:
        with Client(self._address) as client:
            for turn in itertools.count():
                if time.monotonic() > self._end:
                    return
                name = NAMES[(number + turn // 2) % len(NAMES)]
                try:
                    digest, tokens = ask(client, f"churn-{name}")
                except NotFound:  # deleted or ended at this moment; never the base's answer
                    self.counts["not found"] += 1
                    time.sleep(0.02)
                    continue
                except LoramuxError as error:
                    self.wrong.append(f"{name}: {error}")
                    return
                self.counts["answers"] += 1
                self.answered[name] += 1
                if tokens != self._solo[digest]:
                    self.wrong.append(f"{name}: {digest[:12]} gave {tokens[:8]}")

    def _operate(self, number: int) -> None:
        """Each has names of its own: two that push the same version to one name at once go on with one upload."""
        order = random.Random(number)
        due = time.monotonic()
        with Client(self._address) as client:
            while time.monotonic() < self._end:
                kind, version = order.choice(NAMES[number::OPERATORS]), order.randrange(VERSIONS)
                name = f"churn-{kind}"
                match order.randrange(9):
                    case 0:
                        operation = "delete"
                        with suppress(NotFound):
                            client.delete(name)
                    case 1:
                        operation = "merge"
                        with suppress(LoramuxError):  # deleted, or refused for want of memory
                            client.update(name, merge=bool(version))
                    case 2:
                        operation = "pin"
                        with suppress(NotFound):
                            client.update(name, pinned=bool(version))
                    case 3:
                        operation = "alias"
                        with suppress(NotFound):
                            client.update(name, add_aliases=["churn-alias"])
                    case _:
                        operation = "push"
                        self.push(client, kind, version)
                self.counts[operation] += 1
                due += OPERATORS / OPERATIONS_PER_SECOND
                time.sleep(max(0.0, due - time.monotonic()))


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_streams_keep_the_version_they_started_with(
    server: LocalServer, client: Client, directories: dict[str, Path], solo: dict[str, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in solo.values()}) > len(solo) // 2
    churn = Churn(server.address, directories, solo)
    for name in NAMES:
        churn.push(client, name, 0)
    churn.run()
    print(f"{STREAMS} streams, {SECONDS:g} s: {dict(churn.counts)}; answers {dict(churn.answered)}")
    assert not churn.wrong
    assert churn.counts["answers"] > 0
    assert SECONDS < 30 or churn.answered.keys() >= set(KINDS)
    assert churn.counts["push"] > 0
    for name in NAMES:
        with suppress(NotFound):
            client.delete(f"churn-{name}")

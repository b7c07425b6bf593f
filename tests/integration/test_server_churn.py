"""Adapters of many kinds are pushed, replaced, aliased, merged and deleted while streams run on them.

Every stream equals its solo run on the version it started with, and afterwards nothing is held. `CHURN_SECONDS`
makes it longer than the suite has time for.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import peft
import pytest
from peft import PeftConfig

from loramux import Client
from loramux.errors import LoramuxError, NotFound, ResourceExhausted
from loramux.local_server import LocalServer
from loramux_adapters.embedded.tiny import tiny_path
from support.kinds import make_kind
from support.live import GREEDY, metric, until, until_idle

SECONDS = float(os.environ.get("CHURN_SECONDS", "6"))
STREAMS = 32 if SECONDS > 30 else 7
OPERATIONS_PER_SECOND = 20
TOKENS = 40
PROMPT = [5, 17, 4, 60, 9, 33, 8]
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, PeftConfig] = {
    "lora": peft.LoraConfig(r=4, **ATTENTION),
    "large": peft.LoraConfig(r=32, task_type="CAUSAL_LM", target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, use_dora=True, **ATTENTION),
    "ia3": peft.IA3Config(feedforward_modules=[], **ATTENTION),
    "oft": peft.OFTConfig(oft_block_size=32, **ATTENTION),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of each kind."""
    root = tmp_path_factory.mktemp("churn")
    return {
        f"{kind}-{version}": make_kind(tiny_path(), root / f"{kind}-{version}", config, seed=version, std=0.2)
        for kind, config in CONFIGS.items()
        for version in range(2)
    }


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
        self.wrong: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(STREAMS)]
        threads.append(threading.Thread(target=self._operate))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 120)
            assert not thread.is_alive()

    def _stream(self, number: int) -> None:
        kind = list(CONFIGS)[number % len(CONFIGS)]
        with Client(self._address) as client:
            while time.monotonic() < self._end:
                try:
                    digest, tokens = ask(client, f"churn-{kind}")
                except NotFound:  # deleted at this moment; never the base's answer
                    self.counts["not found"] += 1
                    time.sleep(0.02)
                    continue
                except ResourceExhausted:  # of the queue: more streams than this server takes
                    self.counts["queue full"] += 1
                    continue
                except LoramuxError as error:
                    self.wrong.append(f"{kind}: {error}")
                    return
                self.counts["answers"] += 1
                if tokens != self._solo[digest]:
                    self.wrong.append(f"{kind}: {digest[:12]} gave {tokens[:8]}")

    def _operate(self) -> None:
        order = random.Random(0)
        due = time.monotonic()
        with Client(self._address) as client:
            while time.monotonic() < self._end:
                kind, version = order.choice(list(CONFIGS)), order.randrange(2)
                name = f"churn-{kind}"
                match order.randrange(8):
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
                    case _:
                        operation = "push"
                        client.push(self._directories[f"{kind}-{version}"], name)
                self.counts[operation] += 1
                due += 1 / OPERATIONS_PER_SECOND
                time.sleep(max(0.0, due - time.monotonic()))


def test_streams_keep_the_version_they_started_with(
    server: LocalServer, client: Client, directories: dict[str, Path], solo: dict[str, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in solo.values()}) > len(solo) // 2
    for kind in CONFIGS:
        client.push(directories[f"{kind}-0"], f"churn-{kind}")
    churn = Churn(server.address, directories, solo)
    churn.run()
    print(dict(churn.counts))
    assert not churn.wrong
    assert churn.counts["answers"] > 0
    assert churn.counts["push"] > 0
    for kind in CONFIGS:
        with suppress(NotFound):
            client.delete(f"churn-{kind}")
    until_idle(server)
    until(lambda: metric(server, "loramux_adapter_leases")[()] == 0, "no lease is left")

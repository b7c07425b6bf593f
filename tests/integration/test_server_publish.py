"""Versions published, gated and rolled back while streams run: each stream is its version's own answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loramux import Client
from loramux.errors import FailedPrecondition
from loramux.local_server import LocalServer
from support.live import until_idle
from support.training import job_file, job_values, train_together

STREAMS, PUBLISHES = 32, 20
PROMPT = [5, 60, 7, 101, 111, 114, 33, 90]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of different methods, trained in one fleet, each with its certificate."""
    root = tmp_path_factory.mktemp("versions")
    jobs: list[dict[str, Any]] = [
        {"name": "a", "lora": {"rank": 4}},
        {"name": "b", "lora": {"rank": 8}, "training": {"seed": 3}},
        {"name": "c", "method": "dora", "lora": {"rank": 4}},
        {"name": "d", "method": "ia3", "training": {"learning_rate": 0.2}},
    ]
    file = job_file(job_values(root), jobs=jobs)
    outcome = train_together(file.jobs)
    assert not outcome.failures
    return [job.output for job in file.jobs]


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("busy")
    options = {
        "dtype": "float32", "data_dir": str(root / "data"), "kv_bytes": "64MiB", "adapter_device_bytes": "64MiB",
        "max_running": str(STREAMS), "max_queued": "64",
    }  # fmt: skip
    with LocalServer(options, log=root / "server.log") as server:
        yield server


def ask(client: Client, adapter: str) -> tuple[str, tuple[int, ...]]:
    """The version that answered, and its tokens."""
    found = client.generate(
        token_ids=PROMPT, adapter=adapter, max_tokens=16, temperature=0, ignore_eos=True, return_token_ids=True
    )
    return found.prompt.adapter_digest or "", found.choices[0].token_ids


def gate(client: Client, adapter: str) -> float:
    """Log-probability of the prompt: any number by which a version is chosen."""
    answer = client.generate(token_ids=PROMPT, adapter=adapter, max_tokens=1, temperature=0, prompt_logprobs=0)
    return sum(entry.logprob or 0.0 for entry in answer.prompt.logprobs)


def test_streams_are_those_of_their_versions_while_versions_come_and_go(
    versions: list[Path], busy: LocalServer
) -> None:
    with Client(busy.address) as client:
        solo = {}
        for index, directory in enumerate(versions):
            pushed = client.push(directory, f"solo-{index}").adapter
            assert pushed.certificate is not None
            digest, solo_tokens = ask(client, f"solo-{index}")
            assert digest == pushed.digest
            solo[digest] = solo_tokens
        assert len(set(solo.values())) == len(versions)
        client.push(versions[0], "bot")

        done = threading.Event()
        answers: list[tuple[str, tuple[int, ...]]] = []

        def stream() -> None:
            with Client(busy.address) as own:
                while not done.is_set():
                    answers.append(ask(own, "bot"))

        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(stream) for _ in range(STREAMS)]
            try:
                expected = _publish_and_roll_back(client, versions)
            finally:
                done.set()
            for each in streams:
                each.result(60)
        assert expected == client.adapter("bot").digest
        assert {digest for digest, _ in answers} >= set(list(solo)[:2])
        assert len(answers) > STREAMS
        for digest, found in answers:
            assert found == solo[digest], digest[:12]
        until_idle(busy)


def _publish_and_roll_back(client: Client, versions: list[Path]) -> str:
    """Candidates under a name of their own; those that the gate prefers become `bot`, every fifth goes back. Returns
    what `bot` points at.
    """
    for number in range(PUBLISHES):
        current = client.adapter("bot")
        candidate = client.push(versions[number % len(versions)], "candidate").adapter
        if candidate.digest != current.digest and (gate(client, "candidate") > gate(client, "bot") or number % 3 == 0):
            moved = client.update("bot", version=candidate.digest, if_version=current.digest)
            assert moved.digest == candidate.digest
            with pytest.raises(FailedPrecondition, match="points at"):  # somebody who looked before
                client.update("bot", version=current.digest, if_version=current.digest)
            if number % 5 == 0:
                assert client.rollback("bot").digest == current.digest
        client.delete("candidate")
    return client.adapter("bot").digest

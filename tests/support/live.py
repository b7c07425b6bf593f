"""Asking a running `loramux serve`: answers that can be compared, metrics, and the moment when nothing is held."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loramux import Client
from loramux.local_server import LocalServer
from loramux.types import GenerateOptions

PROMPT = "The capital of"
GREEDY: GenerateOptions = {"temperature": 0.0, "seed": 1, "ignore_eos": True}
LOGPROB_TOLERANCE = 1e-4
"""What neighbors may change of a log-probability in float32; tokens they may not change."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer: what must not depend on neighbors."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def check_equals(self, alone: Answer) -> None:
        """As the request's solo run."""
        assert self.tokens == alone.tokens
        assert self.logprobs == pytest.approx(alone.logprobs, abs=LOGPROB_TOLERANCE)

    def check_begins(self, alone: Answer) -> None:
        """As the first tokens of a longer solo run."""
        count = len(self.tokens)
        self.check_equals(Answer(alone.tokens[:count], alone.logprobs[:count]))


def ask(client: Client, adapter: str = "", max_tokens: int = 24, **more: Any) -> Answer:
    """A greedy answer of exactly `max_tokens` tokens to one and the same prompt."""
    options: dict[str, Any] = {**GREEDY, "max_tokens": max_tokens, "logprobs": 0, "return_token_ids": True, **more}
    choice = client.generate(PROMPT, adapter=adapter, **options).choices[0]
    return Answer(choice.token_ids, tuple(entry.logprob or 0.0 for entry in choice.logprobs))


def scrape(server: LocalServer, accept: str = "text/plain") -> str:
    """The metrics page."""
    request = urllib.request.Request(f"http://{server.metrics_address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def metric(server: LocalServer, name: str) -> dict[tuple[str, ...], float]:
    """Samples of `name` by the values of their labels, in the alphabetical order of the labels' names."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(scrape(server))
        for sample in family.samples
        if sample.name == name
    }


def is_idle(server: LocalServer) -> bool:
    """Whether no request runs or waits and no KV block is held."""
    held = metric(server, "loramux_num_requests_running")[()] + metric(server, "loramux_kv_cache_usage_ratio")[()]
    return held + sum(metric(server, "loramux_num_requests_waiting").values()) == 0


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for a state of the server."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def until_idle(server: LocalServer, seconds: float = 60.0) -> None:
    """Wait until everything is given back."""
    until(lambda: is_idle(server), "requests, or their blocks, are still held", seconds)


def resident_bytes(pid: int) -> int:
    """Memory a process has now."""
    return _status(pid, "VmRSS")


def cpu_seconds(pid: int) -> float:
    """Processor time that the living threads of a process have had, to the microsecond. Linux."""
    used = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            used += int((task / "schedstat").read_text().split()[0])
    return used / 1e9


class Peak:
    """The most memory a process had in the `with`, above what it had before. Linux."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.growth = 0  # bytes

    def __enter__(self) -> Peak:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        self._before = resident_bytes(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = _status(self._pid, "VmHWM") - self._before


def _status(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

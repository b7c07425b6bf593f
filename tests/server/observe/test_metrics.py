"""Metrics: both formats parse, series stay bounded, and one sample tells pickers about adapters."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Collection
from functools import partial

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from loramux_adapters.store.records import AdapterNames
from loramux_server.engine.stats import Ended, Load, StepCounters, StepStats, StepTimes
from loramux_server.errors import StartError
from loramux_server.observe.exporter import Exporter, Probes
from loramux_server.observe.metrics import AdapterReading, Metrics
from loramux_server.observe.top_series import OTHER, TopSeries


def _digest(index: int) -> str:
    return f"{index:064x}"[::-1]


def _load(running: frozenset[str] = frozenset(), waiting: frozenset[str] = frozenset()) -> Load:
    waits = {"capacity": 3, "blocks": 0, "adapter": 2, "sibling": 0}
    return Load(4, waits, running, waiting, kv_blocks=10, kv_blocks_held=5)  # type: ignore[arg-type]


def _step(ended: list[Ended], load: Load | None = None) -> StepStats:
    counters = StepCounters(queued=[0.01], first_token=[0.02], inter_token=[0.001] * 3, ended=ended, preemptions=1)
    times = StepTimes(plan=0.001, run=0.01, forward=0.008)
    return StepStats(1, 12, 1, 3, 2, None, 0, load or _load(), counters, times)


def _ended(digest: str | None) -> Ended:
    return Ended("default", digest, "stop", 0.5, prompt=7, completion=5, cached=0, preemptions=0)


def _values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    families = parse_text(generate_latest(metrics.registry).decode())
    return {
        tuple(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def test_a_step_is_counted() -> None:
    metrics = Metrics()
    metrics.step(_step([_ended(None), _ended(_digest(1))]))
    metrics.rejected("OVERLOADED")
    assert _values(metrics, "loramux_sequences_total") == {("stop",): 2}
    assert _values(metrics, "loramux_prompt_tokens_total") == {(): 14}
    assert _values(metrics, "loramux_step_tokens_total") == {(): 12}
    assert _values(metrics, "loramux_inter_token_latency_seconds_count") == {(): 3}
    assert _values(metrics, "loramux_rejections_total") == {("OVERLOADED",): 1}
    assert _values(metrics, "loramux_kv_cache_usage_ratio") == {(): 0.5}
    assert _values(metrics, "loramux_num_requests_waiting")[("adapter",)] == 2
    assert _values(metrics, "loramux_adapter_sequences_total")[("base",)] == 1


def test_adapter_states_are_read_at_the_scrape() -> None:
    tiers = {"resident": (2, 2048)}
    metrics = Metrics(lambda: AdapterReading(tiers=tiers, loads_total={"ok": 5}, slots=8))
    assert _values(metrics, "loramux_adapters") == {("resident",): 2}
    tiers["resident"] = (1, 1024)
    assert _values(metrics, "loramux_adapters_bytes") == {("resident",): 1024}
    assert _values(metrics, "loramux_adapter_loads_total") == {("ok",): 5}


def test_requests_info_is_one_sample_and_never_stale() -> None:
    metrics = Metrics(lambda: AdapterReading(slots=8))
    metrics.named(_digest(1), "german")
    for running in (frozenset({_digest(1)}), frozenset({_digest(1), _digest(2)}), frozenset[str]()):
        metrics.step(_step([], _load(running, frozenset({_digest(1)}))))
    assert list(_values(metrics, "loramux_lora_requests_info")) == [("8", "", "german")]


def test_a_thousand_adapters_stay_bounded_and_both_formats_parse() -> None:
    metrics = Metrics(top_adapters=50)
    for turn in range(3):
        metrics.step(
            _step([_ended(_digest(index)) for index in range(1000)], _load(frozenset(map(_digest, range(64)))))
        )
        assert turn >= 0
    begun = time.thread_time()
    text = generate_latest(metrics.registry).decode()
    openmetrics = exposition.generate_latest(metrics.registry).decode()
    assert time.thread_time() - begun < 1.0
    families = list(parse_text(text))
    assert {family.name for family in families} >= {"loramux_sequences", "loramux_lora_requests_info"}
    parsed = list(parse_openmetrics(openmetrics))
    assert all(":" not in family.name for family in parsed)
    by_adapter = _values(metrics, "loramux_adapter_sequences_total")
    assert len(by_adapter) == 51
    assert sum(by_adapter.values()) == 3000
    assert sum(len(family.samples) for family in families) < 400


def test_top_series_follow_the_busy_and_every_series_only_grows() -> None:
    top = TopSeries(2)
    seen: dict[str, float] = {}
    for key in ["a", "b", *["c"] * 10, "a", "b", *["d"] * 30, *["c"] * 3]:
        top.add(key, 1)
        now = top.read()
        assert len(now) <= 3
        assert now[OTHER] >= seen.get(OTHER, 0)
        assert all(now[kept] >= seen[kept] for kept in now.keys() & seen.keys())
        seen = now
    assert "d" in seen
    assert "c" in seen


def test_top_series_forget_who_is_idle() -> None:
    top = TopSeries(2)
    for index in range(20_000):
        top.add(f"once-{index}", 1)
    assert sum(top.read().values()) <= 20_000
    assert len(top._scores) < 200


def test_names_and_aliases_join_the_series_of_an_adapter() -> None:
    asked: list[set[str]] = []

    def names(digests: Collection[str]) -> dict[str, AdapterNames]:
        asked.append(set(digests))
        return {_digest(1): AdapterNames(("german", "old-german"), ("de", "prod"))}

    metrics = Metrics(top_adapters=2, names=names)
    metrics.step(_step([_ended(None), _ended(_digest(1)), _ended(_digest(2)), _ended(_digest(3))]))
    short = _digest(1)[:12]
    assert _values(metrics, "loramux_adapter_info") == {
        (short, "de,prod", _digest(1), "german,old-german"): 1  # labels as the exposition sorts them
    }
    assert (short,) in _values(metrics, "loramux_adapter_sequences_total")
    assert all(len(digests) <= 2 and not {"base", OTHER} & digests for digests in asked)


def test_the_process_is_measured_too() -> None:
    metrics = Metrics()
    assert _values(metrics, "process_resident_memory_bytes")[()] > 1 << 20
    assert _values(metrics, "process_open_fds")[()] > 2


def _ask(address: str, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_probes_are_answered_and_other_paths_are_not() -> None:
    state = {"alive": True, "ready": False}
    probes = Probes(lambda: state["alive"], lambda: state["ready"])
    exporter = Exporter(Metrics().registry, "127.0.0.1:0", probes)
    try:
        ask = partial(_ask, exporter.address)
        assert ask("/healthz") == (200, b"ok\n")
        assert ask("/readyz") == (503, b"not serving\n")
        state.update(alive=False, ready=True)
        assert (ask("/healthz")[0], ask("/readyz")[0]) == (503, 200)
        assert ask("/readyz", "HEAD") == (200, b"")
        assert ask("/metrics", "HEAD") == (200, b"")
        assert ask("/metrics")[0] == 200
        for path in ("/", "/favicon.ico", "/metrics/x", "/nope"):
            assert ask(path)[0] == 404
        assert ask("/readyz", "POST")[0] == 405
    finally:
        exporter.close()


def test_the_exporter_speaks_both_formats_and_frees_its_port() -> None:
    metrics = Metrics()
    metrics.describe({"model": "loramux-tiny", "device": "cpu"})
    exporter = Exporter(metrics.registry, "127.0.0.1:0")
    try:
        url = f"http://{exporter.address}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert any(family.name == "loramux_steps" for family in parse_text(answer.read().decode()))
        wanted = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        with urllib.request.urlopen(wanted, timeout=5) as answer:
            assert any(family.name == "loramux_server" for family in parse_openmetrics(answer.read().decode()))
        with pytest.raises(StartError, match="metrics_listen"):
            Exporter(metrics.registry, exporter.address)
    finally:
        exporter.close()
    Exporter(metrics.registry, exporter.address).close()

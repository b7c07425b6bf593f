"""A thousand adapters in the real process, and what is held of those that are deleted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from loramux import Client
from loramux.local_server import LocalServer
from loramux.types import MergedState
from support.live import ask, cpu_seconds, metric, scrape, until, until_idle

OPENMETRICS = "application/openmetrics-text"
PER_ADAPTER = 20  # as the server is told
OTHER = 1  # series for all the rest


def _held(server: LocalServer) -> tuple[float, float, float]:
    """Adapters in slots, adapters in host memory, merged weights."""
    tiers = metric(server, "loramux_adapters")
    return tiers[("resident",)], tiers[("loaded",)], metric(server, "loramux_merged_adapters")[()]


def _merge(client: Client, name: str) -> None:
    def state() -> MergedState:
        return client.adapter(name).residency.merged

    client.update(name, merge=True)
    until(lambda: state() == "ready", f"{name} merged", 30)


def _timed_scrape(server: LocalServer, accept: str, parse: Callable[[str], object]) -> tuple[dict[str, Metric], float]:
    used = cpu_seconds(server.pid)
    page = scrape(server, accept)
    seconds = cpu_seconds(server.pid) - used  # of requests that run meanwhile, too
    families = list(parse(page))  # type: ignore[call-overload]
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}, seconds


def test_a_thousand_adapters_give_a_bounded_number_of_series(
    server: LocalServer, client: Client, crowd: list[str]
) -> None:
    listed = [adapter.name for adapter in client.adapters(page_size=300)]
    assert [name for name in listed if name.startswith("crowd-")] == crowd
    with ThreadPoolExecutor(8) as pool:
        used = crowd[::4]
        assert len(used) > 10 * PER_ADAPTER
        for _ in pool.map(lambda name: ask(client, name, 1), used):
            pass
        busy = [pool.submit(ask, client, name, 60) for name in crowd[:8]]
        text, text_seconds = _timed_scrape(server, "text/plain", parse_text)
        opened, open_seconds = _timed_scrape(server, OPENMETRICS, parse_openmetrics)
        for future in busy:
            future.result(60)
    assert max(text_seconds, open_seconds) < 1.0
    assert {
        "loramux_sequences",
        "loramux_adapters",
        "loramux_step_seconds",
        "loramux_lora_requests_info",
    } <= opened.keys()
    for families in (text, opened):
        assert sum(len(family.samples) for family in families.values()) < 800
        for name in ("loramux_adapter_sequences", "loramux_adapter_generation_tokens"):
            assert 2 <= len(families[name].samples) <= PER_ADAPTER + OTHER
        assert len(families["loramux_lora_requests_info"].samples) == 1
        for family in families.values():
            assert family.documentation
            assert ":" not in family.name
    counted = sum(sample.value for sample in opened["loramux_adapter_sequences"].samples)
    assert counted >= len(used)  # those without a series of their own are counted all the same


def test_a_deleted_adapter_frees_its_slot_host_memory_and_merged_weights(
    server: LocalServer, client: Client, adapter_dirs: dict[str, Path]
) -> None:
    until_idle(server)
    alone = ask(client, "large", 8)
    client.push(adapter_dirs["large"], "twin")  # the same content: the same digest
    client.delete("twin")
    assert client.adapter("large").residency.tier == "resident"  # another name reaches it
    resident, loaded, merged = _held(server)
    client.delete("large")
    before = (resident - 1, loaded - 1, merged)  # without it
    until(lambda: _held(server) == before, "what was held of it is freed")
    client.push(adapter_dirs["large"], "large")
    assert client.adapter("large").residency.tier == "loaded"  # what was read to be published is kept
    ask(client, "large", 8).check_equals(alone)
    _merge(client, "large")
    ask(client, "large", 8).check_equals(alone)
    assert _held(server) == (before[0] + 1, before[1] + 1, before[2] + 1)
    client.delete("large")
    until(lambda: _held(server) == before, "slot, host memory and merged weights are freed")
    client.push(adapter_dirs["large"], "large")
    ask(client, "large", 8).check_equals(alone)


def test_merged_weights_follow_a_replaced_name_and_outputs_stay_equal(
    server: LocalServer, client: Client, adapter_dirs: dict[str, Path]
) -> None:
    until_idle(server)
    old, new = ask(client, "mlp", 200), ask(client, "small", 24)
    client.push(adapter_dirs["mlp"], "switching")
    digest = client.adapter("switching").digest
    client.delete("mlp")  # now this is the only name of that version
    sets = _held(server)[2]
    _merge(client, "switching")
    assert _held(server)[2] == sets + 1
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, "switching", 200)
        until(lambda: client.adapter("switching").residency.leases == 1, "it runs")
        client.push(adapter_dirs["small"], "switching")
        kept = f"switching@{digest[:12]}"
        assert client.adapter(kept).residency.merged == "none"  # no name points at it any more
        until(lambda: client.adapter("switching").residency.merged == "ready", "the new version has one", 30)
        assert _held(server)[2] == sets + 1
        running.result(60).check_equals(old)
    ask(client, kept, 24).check_begins(old)  # served without merged weights
    ask(client, "switching", 24).check_equals(new)
    client.delete("switching")
    assert _held(server)[2] == sets
    client.push(adapter_dirs["mlp"], "mlp")


@pytest.mark.parametrize("page_size", [1, 7, 1000])
def test_pages_hold_every_adapter_once(client: Client, crowd: list[str], page_size: int) -> None:
    names = []
    for adapter in client.adapters(page_size=page_size):
        names.append(adapter.name)
        if page_size == 1 and len(names) == 20:
            break
    assert names == sorted(set(names))
    assert len(names) == 20 or set(crowd) <= set(names)

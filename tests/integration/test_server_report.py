"""What is where: ListAdapters, the metrics and `loramux adapters ls` of one server say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.local_server import LocalServer
from loramux.types import Adapter
from support.live import ask, metric, until, until_idle


@dataclass(frozen=True)
class Report:
    """Counts that all three can tell."""

    names: int
    resident: int
    resident_bytes: int
    loaded: int
    loaded_bytes: int
    leases: int
    pinned: int
    merged: int


def of_list(adapters: list[Adapter]) -> Report:
    """Several names may have one version, which is in one place."""
    versions = {adapter.digest: adapter for adapter in adapters}.values()
    resident = [adapter for adapter in versions if adapter.residency.tier == "resident"]
    loaded = [adapter for adapter in versions if adapter.residency.host_bytes]
    assert all(adapter in resident for adapter in versions if adapter.residency.slot is not None)
    assert {adapter.residency.tier for adapter in loaded} <= {"resident", "loaded"}
    return Report(
        names=len(adapters),
        resident=len(resident),
        resident_bytes=sum(adapter.size_bytes for adapter in resident),
        loaded=len(loaded),
        loaded_bytes=sum(adapter.residency.host_bytes for adapter in loaded),
        leases=sum(adapter.residency.leases for adapter in resident),
        pinned=len({adapter.digest for adapter in adapters if adapter.pinned}),
        merged=sum(adapter.residency.merged == "ready" for adapter in versions),
    )


def of_metrics(server: LocalServer) -> Report:
    counts, sizes = metric(server, "loramux_adapters"), metric(server, "loramux_adapters_bytes")
    assert sizes[("registered",)] > 0
    return Report(
        names=int(counts[("registered",)]),
        resident=int(counts[("resident",)]),
        resident_bytes=int(sizes[("resident",)]),
        loaded=int(counts[("loaded",)]),
        loaded_bytes=int(sizes[("loaded",)]),
        leases=int(metric(server, "loramux_adapter_leases")[()]),
        pinned=int(metric(server, "loramux_pinned_adapters")[()]),
        merged=int(metric(server, "loramux_merged_adapters")[()]),
    )


def run(server: LocalServer, *arguments: str) -> str:
    environment = {"COLUMNS": "300"}
    result = CliRunner(env=environment).invoke(app, ["adapters", *arguments, "--address", server.address])
    assert result.exit_code == 0, result.output
    return result.stdout


def of_ls(server: LocalServer) -> dict[str, tuple[str, str, str, str]]:
    """Name -> tier, leases, merged, desired state, as the table has them."""
    header, *lines = run(server, "ls").splitlines()
    columns = ("TIER", "LEASES", "MERGED", "DESIRED", "ENDS")
    starts = [header.index(column) for column in columns]
    return {
        line.split()[0]: tuple(line[a:b].strip() for a, b in pairwise(starts))  # type: ignore[misc]
        for line in lines
    }


@contextmanager
def streaming(server: LocalServer, client: Client, names: list[str]) -> Iterator[None]:
    """A request on each of `names` runs inside."""
    with ThreadPoolExecutor(len(names)) as pool:
        running = [pool.submit(ask, client, name, 400) for name in names]
        until(
            lambda: metric(server, "loramux_adapter_leases")[()] == len(names) or all(r.done() for r in running),
            "they run",
        )
        yield
        for request in running:
            request.result(60)


def test_list_metrics_and_ls_say_the_same(
    server: LocalServer, client: Client, adapter_dirs: dict[str, Path], crowd: list[str]
) -> None:
    until_idle(server)
    client.push(adapter_dirs["small"], "small-too")
    client.update("small", pinned=True)
    client.update("mlp", merge=True)
    until(lambda: client.adapter("mlp").residency.merged == "ready", "mlp is merged")
    for name in ("large", "small-too", crowd[0], crowd[1]):
        ask(client, name, 2)

    def agree() -> bool:
        """Each is read at its own moment, so between two equal readings of one nothing has moved."""
        before, listed, after = of_metrics(server), of_list(list(client.adapters(page_size=1000))), of_metrics(server)
        return before == listed == after

    until(agree, "list and metrics say the same")
    report = of_metrics(server)
    assert report.resident >= 4
    assert (report.leases, report.pinned, report.merged) == (0, 1, 1)
    table, told = of_ls(server), json.loads(run(server, "ls", "--json"))
    shown = {
        entry["name"]: (
            entry["residency"]["tier"],
            str(entry["residency"]["leases"]),
            entry["residency"]["merged"],
            ", ".join(word for word, key in (("pin", "pinned"), ("merge", "merge")) if entry[key]),
        )
        for entry in told
    }
    assert table == shown
    assert len(table) == report.names
    assert table["small"][3] == "pin"
    assert table["mlp"][2] == "ready"
    with streaming(server, client, ["large", "small"]):
        until(agree, "and while requests run")
    client.update("small", pinned=False)
    client.update("mlp", merge=False)
    client.delete("small-too")
    until(agree, "and afterwards")

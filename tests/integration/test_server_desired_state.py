"""What a server finds again after a restart: the desired state of names, and the bases adapters were accepted for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loramux import Client
from loramux.errors import FailedPrecondition
from loramux.local_server import LocalServer
from loramux_adapters.embedded.tiny import tiny_path
from support.live import ask, metric, until

pytestmark = pytest.mark.slow
OPTIONS = {"dtype": "float32", "kv_bytes": "16MiB", "readiness_seconds": "0", "drain_seconds": "5"}


@contextmanager
def started(root: Path, **options: str) -> Iterator[tuple[LocalServer, Client]]:
    """A server on one and the same data directory, ended by SIGTERM, and its client."""
    running = LocalServer({**OPTIONS, "data_dir": str(root / "data"), **options}, log=root / "log")
    with running as server, Client(server.address) as client:
        yield server, client


def until_fulfilled(client: Client, name: str) -> None:
    """Both have come true."""

    def is_fulfilled() -> bool:
        residency = client.adapter(name).residency
        return (residency.tier, residency.merged) == ("resident", "ready")

    until(is_fulfilled, f"{name} is resident and has merged weights", 30)


def test_desired_state_outlives_a_restart_and_follow_their_name(tmp_path: Path, adapter_dirs: dict[str, Path]) -> None:
    with started(tmp_path) as (_, client):
        old = client.push(adapter_dirs["small"], "hot").adapter
        client.push(adapter_dirs["mlp"], "plain")
        changed = client.update("hot", pinned=True, merge=True)
        assert (changed.pinned, changed.merge) == (True, True)
        until_fulfilled(client, "hot")
        alone = ask(client, "hot")
    with started(tmp_path) as (server, client):
        until_fulfilled(client, "hot")
        asked = metric(server, "loramux_adapter_sequences_total")
        assert sum(asked.values()) == asked[("base",)]  # for the warm-up: nobody asked for an adapter
        assert client.adapter("plain").residency.tier == "registered"
        ask(client, "hot").check_equals(alone)
        new = client.push(adapter_dirs["large"], "hot").adapter
        assert (new.pinned, new.merge) == (True, True)
        until_fulfilled(client, "hot")
        assert client.adapter(f"hot@{old.digest[:12]}").residency.merged == "none"
    (tmp_path / "deterministic.yaml").write_text("deterministic: true\n")
    with started(tmp_path, config=str(tmp_path / "deterministic.yaml")) as (_, client):
        until(lambda: client.adapter("hot").residency.tier == "resident", "it is resident", 30)
        residency = client.adapter("hot").residency
        assert residency.merged == "refused"
        assert "deterministic" in residency.merged_reason
        changed = client.update("hot", pinned=False, merge=False)
        assert (changed.pinned, changed.merge, changed.residency.merged) == (False, False, "none")


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    """loramux-tiny but for one weight matrix: every shape is the same."""
    directory = tmp_path / "tiny-too"
    shutil.copytree(tiny_path(), directory)
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("down_proj.weight"))
    save_file({**weights, name: weights[name].flip(0).contiguous()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_an_adapter_is_not_served_on_a_base_it_was_not_accepted_for(
    tmp_path: Path, adapter_dirs: dict[str, Path], other_base: Path
) -> None:
    with started(tmp_path) as (_, client):
        first = client.model().fingerprint
        pushed = client.push(adapter_dirs["small"], "undeclared").adapter
        assert (pushed.base_fingerprint, pushed.accepted_bases) == (None, (first,))
        client.update("undeclared", pinned=True, merge=True)
        until_fulfilled(client, "undeclared")
        alone = ask(client, "undeclared")
    with started(tmp_path, model=str(other_base)) as (_, client):
        second = client.model().fingerprint
        assert first != second
        with pytest.raises(FailedPrecondition) as caught:
            ask(client, "undeclared")
        assert caught.value.reason == "ADAPTER_INCOMPATIBLE"
        assert f"was accepted for base {first}, this server holds {second}; upload it again" in str(caught.value)
        found = client.adapter("undeclared")
        assert found.accepted_bases == (first,)
        until(lambda: client.adapter("undeclared").residency.merged == "refused", "so are its merged weights", 30)
        assert "upload it again" in client.adapter("undeclared").residency.merged_reason
        again = client.push(adapter_dirs["small"], "undeclared")
        assert (again.created, again.adapter.digest) == (False, pushed.digest)
        assert set(again.adapter.accepted_bases) == {first, second}
        until_fulfilled(client, "undeclared")  # at once, not when a failed load is tried again
        assert ask(client, "undeclared").tokens != alone.tokens
    with started(tmp_path) as (_, client):  # back to the first base: nothing need be uploaded twice
        assert ask(client, "undeclared").tokens == alone.tokens

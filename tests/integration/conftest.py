"""One real server process per worker, on the embedded base in float32: a thousand adapters at rest, a few that PEFT
made to be used. Tests remove what they add."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux import Client, local_server
from loramux.local_server import LocalServer
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from support.checkpoints import make_adapter_for
from support.prepared import Preparation, PreparedPopen
from support.stores import TENANT, manifest_of, quick_store
from support.tiny import load_tiny
from support.tiny_adapters import tiny_files

CROWD = 1000
OPTIONS = {
    "dtype": "float32",
    "kv_bytes": "64MiB",
    "adapter_device_bytes": "64MiB",
    "max_running": "8",
    "max_queued": "8",
    "max_batch_tokens": "256",
    "metrics_adapters": "20",
    "max_uploads": "1000",
    "readiness_seconds": "0.2",
    "drain_seconds": "20",
    "stall_seconds": "2",
}


@pytest.fixture(scope="session")
def preparation() -> Iterator[Preparation]:
    """A process that has imported what a server imports, begun when the first one is wanted."""
    prepared = Preparation()
    yield prepared
    prepared.close()


@pytest.fixture(scope="module", autouse=True)
def prepared_servers(preparation: Preparation) -> Iterator[None]:
    """Servers that tests of this directory start are forks of that process, but for the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_server, "subprocess", PreparedPopen(preparation))
        yield


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT directories by name, of different ranks and targets; each changes what the base says."""
    root = tmp_path_factory.mktemp("peft")
    kinds = {
        "small": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "large": {"r": 16, "target_modules": "all-linear"},
        "mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    }
    return {
        name: make_adapter_for(tiny_path(), root / name, seed=seed, std=0.2, **options)
        for seed, (name, options) in enumerate(kinds.items())
    }


@pytest.fixture(scope="session")
def crowd() -> list[str]:
    """Names of small adapters that the server finds in its store at its start."""
    return [f"crowd-{index:04}" for index in range(CROWD)]


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, adapter_dirs: dict[str, Path], crowd: list[str]
) -> Iterator[LocalServer]:
    """A server that holds every adapter of `adapter_dirs` and `crowd`."""
    root = tmp_path_factory.mktemp("server")
    _register(root / "data", crowd)
    with LocalServer({**OPTIONS, "data_dir": str(root / "data")}, log=root / "log") as running:
        with Client(running.address) as client:
            for name, directory in adapter_dirs.items():
                client.push(directory, name)
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    """A client of the session's server."""
    with Client(server.address) as connected:
        yield connected


def _register(data_dir: Path, names: list[str]) -> None:
    """What a thousand uploads leave in a store, without a server and its waits for the disk."""
    base = load_tiny().spec
    with quick_store(data_dir) as store:
        for index, name in enumerate(names):
            files = tiny_files(index, rank=1, layers=(index % 4,))
            upload_id = f"upload-{name}"
            store.begin_upload(TENANT, upload_id, manifest_of(name, files))
            for file, data in files.items():
                store.write_chunk(TENANT, upload_id, file, 0, data)
            staged = store.staged_files(TENANT, upload_id)
            store.publish(TENANT, upload_id, formats.read(staged.files, base, ReadLimits()).spec, base.fingerprint)

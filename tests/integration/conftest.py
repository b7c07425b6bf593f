"""One real server process per module, on the embedded base in float32, and adapters that PEFT made for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorica import Client
from lorica.local_server import LocalServer
from lorica_adapters.embedded.tiny import tiny_path
from support.checkpoints import make_adapter_for

OPTIONS = {
    "dtype": "float32",
    "kv_bytes": "64MiB",
    "adapter_device_bytes": "64MiB",
    "max_running": "8",
    "max_queued": "8",
    "max_batch_tokens": "256",
    "readiness_seconds": "0.2",
    "drain_seconds": "20",
    "stall_seconds": "5",
}


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT directories by name, of different ranks and targets."""
    root = tmp_path_factory.mktemp("peft")
    kinds = {
        "small": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "large": {"r": 16, "target_modules": "all-linear"},
        "mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    }
    return {
        name: make_adapter_for(tiny_path(), root / name, seed=seed, std=0.1, **options)
        for seed, (name, options) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, adapter_dirs: dict[str, Path]) -> Iterator[LocalServer]:
    """A server that holds every adapter of `adapter_dirs`."""
    root = tmp_path_factory.mktemp("server")
    with LocalServer({**OPTIONS, "data_dir": str(root / "data")}, log=root / "log") as running:
        with Client(running.address) as client:
            for name, directory in adapter_dirs.items():
                client.push(directory, name)
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    """A client of the module's server."""
    with Client(server.address) as connected:
        yield connected

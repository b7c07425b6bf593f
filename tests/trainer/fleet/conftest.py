"""One base with a fleet's modules in it, and what such a fleet computes on one thread."""

from collections.abc import Iterator

import pytest
import torch

from loramux_adapters.base.load import LoadedBase
from loramux_adapters.guard.examine import Examined, examine
from loramux_trainer.fleet.model import FleetModel
from support.tiny import load_tiny


@pytest.fixture(scope="session")
def fleet_base() -> LoadedBase:
    return load_tiny()


@pytest.fixture(scope="session")
def examined(fleet_base: LoadedBase) -> Examined:
    return examine(fleet_base, 512)


@pytest.fixture
def model(fleet_base: LoadedBase, examined: Examined) -> Iterator[FleetModel]:
    with FleetModel(fleet_base, examined) as model:
        yield model


@pytest.fixture
def deterministic(fleet_base: LoadedBase, examined: Examined) -> Iterator[FleetModel]:
    """On one thread: many small products on two wait for each other where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FleetModel(fleet_base, examined, deterministic=True) as model:
            yield model
    finally:
        torch.set_num_threads(threads)

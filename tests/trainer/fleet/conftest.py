"""One base with a fleet's modules in it, and what such a fleet computes on one thread."""

from collections.abc import Iterator

import pytest

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
def deterministic(one_thread: None, fleet_base: LoadedBase, examined: Examined) -> Iterator[FleetModel]:
    with FleetModel(fleet_base, examined, deterministic=True) as model:
        yield model

"""What the composition root gives to what assembles a server's runtime, and what it gets back.

Torch-free: `app` knows these, `assembly` makes the real ones, tests make others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from loramux_adapters.store.lock import DirectoryLock
from loramux_server.api.gate import Services
from loramux_server.config import ServeConfig
from loramux_server.engine.engine import Engine
from loramux_server.observe.metrics import AdapterReading, Metrics


@dataclass(frozen=True)
class EngineCallbacks:
    """The side that listens. `on_death` is called on the engine thread, once, if its loop dies."""

    loop: asyncio.AbstractEventLoop
    metrics: Metrics
    on_death: Callable[[BaseException], None]


@dataclass(frozen=True)
class ServerRuntime:
    """A server's inside, ready to start. `close` lets go of pool and store, after the engine has ended."""

    services: Services
    engine: Engine
    reading: Callable[[], AdapterReading]
    close: Callable[[], None]


Build = Callable[[ServeConfig, EngineCallbacks, DirectoryLock | None], ServerRuntime]
"""The lock is the data directory's, for the store to hold and release; without one the store takes it."""

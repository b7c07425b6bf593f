"""The door of the services: whether the server takes work, and with what it is done.

gRPC listens before the model is loaded, so that health can say NOT_SERVING; until `open`
every call is refused. Running work is not asked again.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.api.ports import AdapterStates, Codec, ModelInfo
from loramux_server.engine.client import EngineClient
from loramux_server.errors import Draining, WarmingUp
from loramux_server.registry import Registry


@dataclass(frozen=True)
class Parts:
    """What the services work with, once the server is warm."""

    engine: EngineClient
    registry: Registry
    codec: Codec
    model: ModelInfo
    states: AdapterStates


class Gate:
    """One per server, moved by whoever starts and stops it."""

    def __init__(self) -> None:
        self._parts: Parts | None = None
        self._draining = False

    @property
    def is_open(self) -> bool:
        """Whether new work is taken."""
        return self._parts is not None and not self._draining

    def open(self, parts: Parts) -> None:
        """Take work from now on."""
        self._parts = parts

    def drain(self) -> None:
        """Refuse new work from now on; looking stays allowed."""
        self._draining = True

    def enter(self) -> Parts:
        """For new work. Raises WarmingUp while the base loads, Draining while stopping."""
        if self._draining:
            raise Draining()
        return self.look()

    def look(self) -> Parts:
        """For calls that only look. Raises WarmingUp while the base loads."""
        if self._parts is None:
            raise WarmingUp()
        return self._parts

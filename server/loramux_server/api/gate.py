"""Whether the services accept calls, and what they work with.

gRPC listens before the model is loaded, so that health can say NOT_SERVING; until `open` every call is refused.
Calls that were accepted are not looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.api.ports import AdapterStates, AdapterTokenizers, ModelInfo, Tokenizer
from loramux_server.engine.client import EngineClient
from loramux_server.errors import Draining, WarmingUp
from loramux_server.held import Held
from loramux_server.registry import Registry


@dataclass(frozen=True)
class Services:
    """What calls are served with, once the server is warm."""

    engine: EngineClient
    registry: Registry
    tokenizer: Tokenizer
    model: ModelInfo
    states: AdapterStates
    texts: AdapterTokenizers | None = None  # None: adapters bring none

    async def tokenizer_for(self, resolved: Held | None) -> Tokenizer:
        """What the texts of a request are made of. Raises AdapterIncompatible and AdapterCorrupt."""
        if resolved is None or self.texts is None:
            return self.tokenizer
        return await self.texts.tokenizer_of(resolved.spec, lambda: self.registry.text_files(resolved.text_source))


class Gate:
    """One per server, opened and drained by the composition root."""

    def __init__(self) -> None:
        self._services: Services | None = None
        self._draining = False

    @property
    def is_open(self) -> bool:
        """Whether new work is accepted."""
        return self._services is not None and not self._draining

    def open(self, services: Services) -> None:
        """Accept calls from now on."""
        self._services = services

    def drain(self) -> None:
        """Refuse new work from now on; calls that only read are still accepted."""
        self._draining = True

    def enter(self) -> Services:
        """For new work. Raises WarmingUp while the base loads, Draining while stopping."""
        if self._draining:
            raise Draining()
        return self.look()

    def look(self) -> Services:
        """For calls that only read. Raises WarmingUp while the base loads."""
        if self._services is None:
            raise WarmingUp()
        return self._services

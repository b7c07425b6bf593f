"""Adapters on their way into memory: one load as the pool keeps it, and reads ahead of a request. Torch-free."""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from loramux_adapters.errors import AdapterError
from loramux_adapters.residency.pinned_set import Size
from loramux_adapters.residency.slots import Slot
from loramux_adapters.residency.tiers import HostTier, Weights

W = TypeVar("W", bound=Weights)

MOST_AHEAD: Final = 2
"""Reads ahead of requests that are in the loader's queue at once: what is asked for now waits for these at most."""

_MOST_REMEMBERED: Final = 1024

_log = logging.getLogger(__name__)


@dataclass
class Load(Generic[W]):
    """One adapter on its way: read from below, then given a slot, then copied to it."""

    digest: str
    started: float
    is_asked: bool  # by a request; otherwise it is only to be kept
    asked_at: int  # tick of the last request for it, or of its start
    state: Literal["reading", "ready", "copying"] = "reading"
    weights: W | None = None
    size: Size | None = None
    slot: Slot | None = None


@dataclass(frozen=True)
class Report(Generic[W]):
    """A stage of `digest` has ended: it was read, or its copy has ended, or an error came."""

    digest: str
    weights: W | None = None
    error: AdapterError | None = None


class Prefetch:
    """Reads into host memory what nobody waits for yet. `ask` is for the engine thread."""

    def __init__(self, host: HostTier[Any], loader: Executor) -> None:
        self._host, self._loader = host, loader
        self._reading: set[str] = set()
        # Read once until a request asks: what has failed, or left a small memory again, is not read in circles.
        self._read_once: dict[str, None] = {}

    def ask(self, digest: str) -> None:
        """Read it, unless it is in memory or was read ahead before, or enough others are being read."""
        if len(self._reading) >= MOST_AHEAD or digest in self._read_once or self._host.size(digest):
            return
        self._read_once[digest] = None
        if len(self._read_once) > _MOST_REMEMBERED:
            del self._read_once[next(iter(self._read_once))]
        self._reading.add(digest)
        self._loader.submit(self._read, digest)

    def asked(self, digest: str) -> None:
        """A request has asked for it, or it is gone: it may be read ahead anew."""
        self._read_once.pop(digest, None)

    def _read(self, digest: str) -> None:
        """On the loader thread. A failure is for the request that will ask."""
        try:
            self._host.load(digest)
        except Exception as error:
            _log.debug("adapter %s was not read ahead: %s", digest, error)
        finally:
            self._reading.discard(digest)  # one operation, which no thread sees halfway

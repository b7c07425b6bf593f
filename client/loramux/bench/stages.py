"""When the stages between an upload's last byte and the first token end, in a server's inside in this process.

Marks are put on the functions for a measurement and taken off again: a server pays nothing for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.formats import registry as formats
from loramux_adapters.residency.host import HostCache
from loramux_adapters.store.local import LocalStore
from loramux_server.model.staging import StagedAdapters

# The stage that ends when a function returns, in their order. What one of them calls of the others is part of it:
# a load reads, and is told as a load.
_ENDS: tuple[tuple[Any, str, str], ...] = (
    (LocalStore, "staged_files", "compare hashes"),
    (formats, "read", "read and check"),
    (LocalStore, "publish", "make durable and name"),
    (HostCache, "load", "bring into host memory"),
    (SlotTensors, "prepare", "cast"),
    (StagedAdapters, "bind", "copy between steps"),
)
REQUEST, FIRST_STEP = "acknowledge and ask", "first step"


class StageClock:
    """Remembers when each stage ended last."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}
        self._inside = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, it watches."""
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _ENDS]
        for owner, name, stage in _ENDS:
            setattr(owner, name, self._marked(getattr(owner, name), stage))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def seconds(self, sent: float, asked: float, first_token: float) -> Mapping[str, float]:
        """Each stage's share of the time from `sent` to `first_token`, waiting included. KeyError: one is missing."""
        stages = [stage for _, _, stage in _ENDS]
        ends = {stage: self._ended[stage] for stage in stages[:3]}
        ends[REQUEST] = asked
        ends |= {stage: self._ended[stage] for stage in stages[3:]}
        ends[FIRST_STEP] = first_token
        spans = pairwise((sent, *ends.values()))
        return {stage: after - before for stage, (before, after) in zip(ends, spans, strict=True)}

    def _marked(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            if getattr(self._inside, "stage", None) is not None:
                return function(*arguments, **options)
            self._inside.stage = stage
            try:
                return function(*arguments, **options)
            finally:
                self._inside.stage = None
                self._ended[stage] = time.perf_counter()

        return marked

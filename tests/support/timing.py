"""Processor time of this thread, for bounds that neither other processes nor a garbage collection break."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Spent:
    """What a block took, once it has ended."""

    seconds: float = 0.0


@contextmanager
def processor_seconds() -> Iterator[Spent]:
    """Measure the block, without the collection that may be due in it: of a process with torch that takes 0.1 s."""
    spent, collecting = Spent(), gc.isenabled()
    gc.disable()
    started = time.thread_time()
    try:
        yield spent
    finally:
        spent.seconds = time.thread_time() - started
        if collecting:
            gc.enable()

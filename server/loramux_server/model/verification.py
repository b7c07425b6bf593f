"""Recomputes the base's fingerprint while serving, module by module: what was true at the start must stay true."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator

from loramux_adapters.apply.inject import AdaptedModel
from loramux_server.engine.plan import WorkerLost
from loramux_server.model.faults import explain_background

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 3600.0
"""From the end of one verification to the beginning of the next."""

STEPS_PER_MODULE = 256
"""Steps with requests between two modules, so that one verification is below what a percentile of them sees; an idle
worker verifies without a pause."""


class Verification:
    """One adapted model's. Belongs to the worker."""

    def __init__(self, adapted: AdaptedModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._adapted, self._clock = adapted, clock
        self._pieces: Generator[None, None, str] | None = None
        self._due = clock() + INTERVAL_SECONDS
        self._steps = 0

    @property
    def is_due(self) -> bool:
        """Whether a module is to be read now, if nothing else is to be done."""
        return self._pieces is not None or self._clock() >= self._due

    def advance(self, *, is_idle: bool) -> None:
        """Reads one module, if it is time for it. Raises WorkerLost where the base is not what it was, DeviceLost."""
        self._steps += 1
        if not self.is_due or not (is_idle or self._steps >= STEPS_PER_MODULE):
            return
        self._steps = 0
        if self._pieces is None:
            self._pieces = self._adapted.refingerprinting()
        try:
            next(self._pieces)
        except StopIteration as end:
            self._begin_anew()
            expected = self._adapted.spec.fingerprint
            if end.value != expected:
                raise WorkerLost(
                    f"the base in memory has changed: its fingerprint is {end.value}, it was loaded as {expected}"
                ) from None
            logger.info("the base in memory is what was loaded", extra={"fields": {"fingerprint": expected}})
        except Exception as error:
            self._begin_anew()  # later: what raised has ended
            explain_background(error, "verifying the base")

    def _begin_anew(self) -> None:
        self._pieces, self._due = None, self._clock() + INTERVAL_SECONDS

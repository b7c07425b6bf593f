"""The end of a running engine at a stop, and what an operator reads of it: its begin, how it goes, what came of it.

Knows no transport; the calls that deliver the last messages are the API's.
"""

from __future__ import annotations

import asyncio
import logging
import time

from loramux_server.runtime import ServerRuntime

_LOG = logging.getLogger("loramux_server.drain")
_REPORT_SECONDS = 5.0
_JOIN_SECONDS = 10.0  # for a step under way when the drain is over


class Drain:
    """One drain of `runtime`: `end_work`, then `report`. On the event loop."""

    def __init__(self, runtime: ServerRuntime) -> None:
        self._client, self._engine = runtime.services.engine, runtime.engine
        self._requests = 0  # that ran or waited when it began
        self._started = time.monotonic()

    async def end_work(self, seconds: float) -> None:
        """Let running requests end; whatever is left after `seconds` ends with ABORTED."""
        self._client.drain()
        self._requests, self._started = self._client.running_requests, time.monotonic()
        _LOG.info("draining", extra={"fields": {"requests": self._requests, "seconds": seconds}})
        stopping = asyncio.ensure_future(asyncio.to_thread(self._engine.stop, seconds, seconds + _JOIN_SECONDS))
        while not (await asyncio.wait({stopping}, timeout=_REPORT_SECONDS))[0]:
            left = self._client.running_requests
            _LOG.info("still draining", extra={"fields": {"requests": left, "seconds": self._seconds()}})
        if not await stopping:
            _LOG.error("the engine did not end")
        await asyncio.sleep(0)  # its last events are delivered before the calls are waited for

    def report(self, calls_cut_off: int) -> None:
        """Log what came of it; `calls_cut_off` are those that were ended before they had answered: an upload, say."""
        cut_off = self._client.cut_off_requests + self._client.running_requests
        fields = {"finished": self._requests - cut_off, "cut_off": cut_off, "seconds": self._seconds()}
        if calls_cut_off:
            fields["calls_cut_off"] = calls_cut_off
        _LOG.log(logging.WARNING if cut_off or calls_cut_off else logging.INFO, "drained", extra={"fields": fields})

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 1)

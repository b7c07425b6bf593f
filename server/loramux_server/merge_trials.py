"""Merged weights tried out before requests use them: an adapter's certificate, if it has one, replayed through them.

Begun on the worker's thread, run on the event loop, told from there. Torch-free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from loramux_adapters.certificate.replay import Replay, check_replay
from loramux_adapters.errors import AdapterError
from loramux_adapters.residency.tiers import Weights
from loramux_server.certification import Certifier
from loramux_server.errors import LoramuxError

_LOG = logging.getLogger(__name__)
_TENANT = "default"

Tried = Callable[[Replay | None, str], None]


class MergeTrials:
    """One per server, in which one trial runs at a time: a step uses the merged weights of one adapter."""

    def __init__(
        self,
        certifier: Certifier,
        load: Callable[[str], Weights],
        certificate: Callable[[str], bytes | None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._certifier, self._load, self._certificate, self._loop = certifier, load, certificate, loop
        self._running = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, digest: str, tried: Tried) -> None:
        """Begins one; `tried` is called once. From any thread."""

        def start() -> None:
            task = self._loop.create_task(self._run(digest, tried))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        with suppress(RuntimeError):  # the server has ended, and nobody uses merged weights any more
            self._loop.call_soon_threadsafe(start)

    async def _run(self, digest: str, tried: Tried) -> None:
        replay: Replay | None = None
        reason = ""
        try:
            async with self._running:
                replay = await self._replay(digest)
            if replay is not None:
                check_replay(replay)
        except (AdapterError, LoramuxError) as error:
            reason = f"its certificate could not be replayed through the merged weights: {error}"
            if replay is not None:
                reason = f"through the merged weights its certificate does not hold: {error}"
        except Exception:
            _LOG.exception("trying out the merged weights of %s failed", digest)
            reason = "the merged weights could not be tried out; see the server's log"
        tried(replay, reason)

    async def _replay(self, digest: str) -> Replay | None:
        content = await asyncio.to_thread(self._certificate, digest)
        if content is None or not await self._certifier.concerns(content):
            return None
        weights = await asyncio.to_thread(self._load, digest)
        return await self._certifier.replay(_TENANT, weights.spec, content, "merged")

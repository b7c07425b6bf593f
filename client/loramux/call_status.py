"""Why a call of grpc.aio that is written to has ended. Knows no service."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

_LOST_STATUS = "Internal error from Core"
_STATUS_SECONDS = 5.0  # at most, for a status that is already on its way
_STATUS_POLLS = 500


class Ending:
    """Why a call that is written to has ended.

    A write that fails puts an INTERNAL of grpc.aio's own in place of the server's status: over it when that is there
    already (the done callback has seen it first), or until it comes (reading again finds it).
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def find(self) -> grpc.aio.AioRpcError:
        """The server's status; what grpc.aio says itself should none come."""
        await self._call.code()
        for _ in range(_STATUS_POLLS):
            self._note(self._call)
            if self._status is not None:
                return self._status
            await asyncio.sleep(_STATUS_SECONDS / _STATUS_POLLS)
        return _read_status(self._call)

    def _note(self, call: Any) -> None:
        status = _read_status(call)
        if self._status is None and status.details() != _LOST_STATUS:
            self._status = status


def _read_status(call: Any) -> grpc.aio.AioRpcError:
    """The status of a call that has ended; read by hand, since a done callback cannot await.

    The four coroutines have nothing to wait for then, so each ends at its first step.
    """
    parts = []
    for asked in (call.code(), call.initial_metadata(), call.trailing_metadata(), call.details()):
        try:
            asked.send(None)
        except StopIteration as answer:
            parts.append(answer.value)
    return grpc.aio.AioRpcError(*parts)

"""The one interceptor: every call is timed, logged, and ends in a status of the error table.

Wraps the request deserializer, because grpc.aio answers malformed protobuf with UNKNOWN
before any handler runs, and the behavior, because it sends clients the exceptions of handlers.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from loramux_server.api.running_calls import RunningCalls
from loramux_server.api.status import answer_error
from loramux_server.api.tracing import note_caller
from loramux_server.errors import INTERNAL, ClientStalled, Draining, InvalidRequest, WarmingUp
from loramux_server.observe.logs import call_noted

_LOG = logging.getLogger("loramux_server.access")
_BUG = logging.getLogger("loramux_server.api")
_ABORT_SECONDS = 2.0
_MOST_WAITING = 1024
_QUIET = ("/grpc.health.v1.", "/grpc.reflection.")

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
else:
    _Handler = grpc.RpcMethodHandler  # not generic at run time

Observe = Callable[[str, str, float], None]
"""(method, code name, seconds) of each finished call, for metrics."""


@dataclass(frozen=True)
class Malformed:
    """Stands for a request that could not be decoded, until the behavior's wrapper refuses it."""


@dataclass
class _Call:
    method: str
    peer: str
    begun: float
    code: str = "OK"
    reason: str = ""
    waits: bool = False  # refused for the time of the warm-up


class ErrorInterceptor(aio.ServerInterceptor):
    """Installed once, first in the chain."""

    def __init__(
        self, observe: Observe | None = None, stall_seconds: float = 30.0, calls: RunningCalls | None = None
    ) -> None:
        self._observe = observe
        self._stall_seconds = stall_seconds
        self._calls = calls or RunningCalls()
        self._waiting: set[tuple[str, str]] = set()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler found for this call; an unknown method stays None: UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _Wrapped(handler, handler_call_details.method, self._end, self._stall_seconds, self._calls)

    def _end(self, call: _Call) -> None:
        seconds = time.monotonic() - call.begun
        quiet = self._is_known_to_wait(call) if call.waits else call.method.startswith(_QUIET) and call.code == "OK"
        fields = {"method": call.method, "code": call.code, "seconds": seconds, "peer": call.peer}
        if call.reason:
            fields["reason"] = call.reason
        _LOG.log(logging.DEBUG if quiet else logging.INFO, "call", extra={"fields": fields})
        if self._observe is not None:
            self._observe(call.method, call.code, seconds)

    def _is_known_to_wait(self, call: _Call) -> bool:
        """Whether that method was refused to that host before: who waits for a warm-up asks again and again, maybe from
        another port each time. Beyond some number of hosts and methods, all count as known.
        """
        waiting = (call.peer.rpartition(":")[0], call.method)
        if waiting in self._waiting or len(self._waiting) >= _MOST_WAITING:
            return True
        self._waiting.add(waiting)
        return False


class _Wrapped(_Handler):
    """A handler of the same shape whose deserializer and behavior never raise to grpc."""

    def __init__(
        self, handler: Any, method: str, end: Callable[[_Call], None], stall_seconds: float, calls: RunningCalls
    ) -> None:
        self._stall_seconds = stall_seconds
        self._calls = calls
        self.request_streaming = handler.request_streaming
        self.response_streaming = handler.response_streaming
        self.response_serializer = handler.response_serializer
        self.request_deserializer = _tolerant(handler.request_deserializer)
        self.unary_unary = handler.unary_unary and self._wrap(handler.unary_unary, method, end)
        self.stream_unary = handler.stream_unary and self._wrap(handler.stream_unary, method, end)
        self.unary_stream = handler.unary_stream and self._wrap(handler.unary_stream, method, end)
        self.stream_stream = handler.stream_stream and self._wrap(handler.stream_stream, method, end)

    def _wrap(self, behavior: Any, method: str, end: Callable[[_Call], None]) -> Any:
        run = self._run_stream if self.response_streaming else self._run_unary

        async def wrapped(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            self._calls.enter(endless=method.startswith(_QUIET))
            call = _Call(method, context.peer() or "", time.monotonic())
            with call_noted(uuid.uuid4().hex) as call_id:
                note_caller(context.invocation_metadata())
                try:
                    return await run(behavior, self._checked(request), context)
                except asyncio.CancelledError:
                    if not self._calls.take_ended():
                        call.code = "CANCELLED"
                        raise
                    await _refuse(Draining(), call, call_id, context)
                except aio.AbortError:  # a foreign behavior (health, reflection) chose its own status
                    call.code = str(getattr(context.code(), "name", context.code()))
                    raise
                except Exception as error:
                    await _refuse(error, call, call_id, context)
                finally:
                    end(call)

        return wrapped

    def _checked(self, request: Any) -> Any:
        if self.request_streaming:
            return _checked_stream(request)
        if isinstance(request, Malformed):
            raise InvalidRequest("", "the request is not a valid protobuf message of its type")
        return request

    @staticmethod
    async def _run_unary(behavior: Any, request: Any, context: Any) -> Any:
        answer: Awaitable[Any] = behavior(request, context)
        return await answer

    async def _run_stream(self, behavior: Any, request: Any, context: Any) -> None:
        """A write blocks after about 4 MB that the client does not read; unbounded, it would hold its request."""
        answer = behavior(request, context)
        if not hasattr(answer, "__aiter__"):  # health's Watch writes to the context itself
            await answer
            return
        async with aclosing(answer) as messages:
            async for message in messages:
                try:
                    async with asyncio.timeout(self._stall_seconds):
                        await context.write(message)
                except TimeoutError:
                    raise ClientStalled(self._stall_seconds) from None


async def _refuse(error: Exception, call: _Call, call_id: str, context: Any) -> None:
    """End the call in the error's status. Raises what grpc ends a call with."""
    answer = answer_error(error, call_id)
    call.code, call.reason = answer.code.name, answer.mapping.reason
    call.waits = isinstance(error, WarmingUp)
    if answer.mapping is INTERNAL:
        _BUG.error("unexpected error", exc_info=error, extra={"fields": {"method": call.method}})
    # A client that does not read holds the status back too; core keeps it for when it reads.
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_SECONDS):
            await context.abort(answer.code, answer.message, answer.trailers)


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return Malformed()

    return tolerant


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            raise InvalidRequest("", "a message of the stream is not a valid protobuf message of its type")
        yield request

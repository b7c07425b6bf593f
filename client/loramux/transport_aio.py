"""What the asyncio client needs of gRPC and of its event loop, under the names that `transport` has for the other one.

Files are read and written on threads. Knows no service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import grpc

from loramux import errors
from loramux.call_status import Ending
from loramux.channel import channel_options

T = TypeVar("T")
P = ParamSpec("P")
Method = Callable[..., Awaitable[T]]
CallError = grpc.aio.AioRpcError
sleep = asyncio.sleep


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel of the running event loop; it connects at its first call."""
    options = channel_options(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def read_error(raised: CallError, address: str) -> errors.LoramuxError:
    """What a call that failed says, as an error of ours."""
    return errors.from_call(raised, address)


async def run_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what waits for files or hashes much, off the event loop."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def send_all(method: Callable[..., Any], messages: Iterator[Any], timeout: float | None, address: str) -> Any:
    """Send `messages`, each made on a thread, and return the response. What making one raises is raised here too."""
    call = method(timeout=timeout)
    ending = Ending(call)
    try:
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            await call.write(message)
        await call.done_writing()
        return await call
    except (asyncio.InvalidStateError, grpc.aio.InternalError, CallError):
        raise read_error(await ending.find(), address) from None
    finally:
        call.cancel()

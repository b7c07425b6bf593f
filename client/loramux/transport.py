"""What the synchronous client needs of gRPC, under the names that `transport_aio` has for the other one.

Everything happens on the caller's thread, but for an upload's messages, which gRPC takes from a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import grpc

from loramux import errors
from loramux.channel import channel_options

T = TypeVar("T")
P = ParamSpec("P")
Method = Callable[..., T]
CallError = grpc.RpcError
sleep = time.sleep


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel; it connects at its first call."""
    options = channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def read_error(raised: CallError, address: str) -> errors.LoramuxError:
    """What a call that failed says, as an error of ours."""
    return errors.from_call(cast(grpc.Call, raised), address)


def run_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` here."""
    return function(*args, **kwargs)


def send_all(method: Callable[..., Any], messages: Iterator[Any], timeout: float | None, address: str) -> Any:
    """Send `messages` and return the response. What making one raises is raised here too."""
    failures: list[Exception] = []

    def guarded() -> Iterator[Any]:
        # gRPC reports an exception of its request iterator as a bare cancellation: keep the cause.
        try:
            yield from messages
        except Exception as error:
            failures.append(error)
            raise

    try:
        return method(guarded(), timeout=timeout)
    except CallError as raised:
        if failures:
            raise failures[0] from None
        raise read_error(raised, address) from None

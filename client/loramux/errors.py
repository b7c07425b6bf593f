"""What a call can fail with: one small family, filled from google.rpc rich details.

Each class says who must act. `reason` is the server's UPPER_SNAKE word, `code` the gRPC status
name; both are stable, the message is for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from loramux.unreachable import explain_too_large, explain_transport

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request that the server refused, by its protobuf path."""

    field: str
    description: str


@dataclass(frozen=True)
class ErrorDetails:
    """The parts of google.rpc's rich details that Loramux's server sends."""

    reason: str = ""
    metadata: Mapping[str, str] | None = None
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None  # seconds
    resource: str = ""
    quotas: tuple[str, ...] = ()


class LoramuxError(Exception):
    """Base of the family. `str(error)` is one line fit for a terminal."""

    code = "UNKNOWN"

    def __init__(self, message: str, details: ErrorDetails | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        details = details or ErrorDetails()
        self.message = message
        self.code = code or type(self).code
        self.reason = details.reason
        self.metadata: Mapping[str, str] = details.metadata or {}
        self.violations = details.violations
        self.retry_after = details.retry_after
        self.resource = details.resource
        self.quotas = details.quotas

    def __str__(self) -> str:
        parts = [self.message]
        parts += [f"{v.field}: {v.description}" for v in self.violations if v.description not in self.message]
        return "; ".join(parts)


class InvalidArgument(LoramuxError):
    """The caller must change the request; `violations` names the fields."""

    code = "INVALID_ARGUMENT"


class OutOfRange(InvalidArgument):
    """The caller must resume an upload at the bytes received."""

    code = "OUT_OF_RANGE"


class FailedPrecondition(LoramuxError):
    """The state forbids the call: a corrupt adapter, an adapter of another base."""

    code = "FAILED_PRECONDITION"


class NotFound(LoramuxError):
    """No such adapter, version, alias or upload; `resource` names it."""

    code = "NOT_FOUND"


class AlreadyExists(LoramuxError):
    """A request id that is running, or an alias that is taken."""

    code = "ALREADY_EXISTS"


class Unauthenticated(LoramuxError):
    """The caller must present valid credentials."""

    code = "UNAUTHENTICATED"


class PermissionDenied(LoramuxError):
    """The caller's role does not allow the call."""

    code = "PERMISSION_DENIED"


class ResourceExhausted(LoramuxError):
    """A queue, quota or size limit is full; retry after `retry_after` seconds where it is set."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(LoramuxError):
    """No server there, or it starts or drains; retrying later may help."""

    code = "UNAVAILABLE"


class DeadlineExceeded(LoramuxError):
    """The timeout passed; the server has stopped working on the request."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(LoramuxError):
    """The call was cancelled, here or by the server."""

    code = "CANCELLED"


class Aborted(LoramuxError):
    """A concurrent change won; read again, then retry."""

    code = "ABORTED"


class Unimplemented(LoramuxError):
    """The server does not know the call: another version, or no Loramux server."""

    code = "UNIMPLEMENTED"


class ServerFault(LoramuxError):
    """The operator must act: an internal error; quote the request id of the message."""

    code = "INTERNAL"


class TransferError(LoramuxError):
    """What came over the wire is not what was announced: a wrong sha256, an unsafe file name, a gap."""

    code = "DATA_LOSS"


class ClientClosed(LoramuxError):
    """The caller must act: `close()` was called on this client; make another."""

    code = "CLOSED"

    def __init__(self) -> None:
        super().__init__("the client is closed; make a new one")


class LocalFilesError(LoramuxError):
    """The caller must act: the directory does not hold an adapter, or the target may not be written."""

    code = "LOCAL"


_BY_CODE: Mapping[str, type[LoramuxError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument, OutOfRange, FailedPrecondition, NotFound, AlreadyExists, Unauthenticated, PermissionDenied,
        ResourceExhausted, Unavailable, DeadlineExceeded, Cancelled, Aborted, Unimplemented, ServerFault, TransferError,
    )
}  # fmt: skip


def from_call(call: grpc.Call | grpc.aio.AioRpcError, address: str) -> LoramuxError:
    """The family member for a failed call; the status name stays in `code` when no class is its own."""
    name = call.code().name
    kind = _BY_CODE.get(name, LoramuxError)
    message = call.details() or f"the server answered {name} without a message"
    details = read_details(call.trailing_metadata())
    if kind is Unavailable and not details.reason:  # from the transport, not from a server
        details = dataclasses.replace(details, metadata={"transport": message})
        message = explain_transport(message, address)
    elif kind is ResourceExhausted and not details.reason and (why := explain_too_large(message)):
        # gRPC itself refused one message: no time will help, the caller must send or ask for less.
        kind, message = InvalidArgument, why
    return kind(message, details, code=name)


def read_details(metadata: object) -> ErrorDetails:
    """Rich details out of trailing metadata (pairs); unreadable ones count as absent."""
    raw = next((value for key, value in _pairs(metadata) if key == _DETAILS_KEY), None)
    if not isinstance(raw, bytes):
        return ErrorDetails()
    status = status_pb2.Status()
    try:
        status.ParseFromString(raw)
        return _collect(status)
    except (DecodeError, ValueError):
        return ErrorDetails()


def _pairs(metadata: Any) -> list[tuple[str, object]]:
    # None on a call that ended without trailers, whatever the stubs say.
    return [(key, value) for key, value in metadata or ()]


def _collect(status: status_pb2.Status) -> ErrorDetails:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, resource = error_details_pb2.RetryInfo(), error_details_pb2.ResourceInfo()
    quota = error_details_pb2.QuotaFailure()
    for detail in status.details:
        for message in (info, bad, retry, resource, quota):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    return ErrorDetails(
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(FieldViolation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        resource=resource.resource_name,
        quotas=tuple(violation.description or violation.subject for violation in quota.violations),
    )

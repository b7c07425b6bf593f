"""What the server refuses and why: one exception family and the one table to status codes.

Free of torch, grpc and protobuf: codes are the numbers and names of the gRPC specification.
Covers this family, `loramux_adapters.errors` and the codes of `RequestFailure`; whatever is
not in the table is a bug and becomes INTERNAL with nothing but a request id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from loramux_adapters import errors as adapters
from loramux_server.requests import RequestFailure


class Code(IntEnum):
    """Status codes of the gRPC specification, by number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class LoramuxError(Exception):
    """Base of the family. `str(error)` is one sentence fit for a stranger: no paths, no internals.

    `metadata` travels in ErrorInfo: limits and counts a program can read.
    """

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequest(LoramuxError):
    """The caller must act: `field` (a path in the request message) breaks a rule.

    `violations` are all that are known, (field, rule) each; the first is this error's own.
    """

    def __init__(self, field: str, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message, metadata=metadata)
        self.field = field
        self.description = message
        self.violations: tuple[tuple[str, str], ...] = ((field, message),)

    @classmethod
    def of_all(cls, errors: Sequence[InvalidRequest]) -> InvalidRequest:
        """One error that says all of `errors`, which are not none."""
        if len(errors) == 1:
            return errors[0]
        whole = cls(errors[0].field, errors[0].description)
        whole.message = "; ".join(error.message for error in errors)
        whole.args = (whole.message,)
        whole.violations = tuple(violation for error in errors for violation in error.violations)
        for error in errors:
            whole.metadata |= error.metadata
        return whole


class NotFound(LoramuxError):
    """The caller must act: `resource` of `kind` does not exist for this caller."""

    def __init__(self, resource: str, *, kind: str = "adapter") -> None:
        super().__init__(f"no {kind} {resource!r}")
        self.resource = resource
        self.kind = kind


class AlreadyExists(LoramuxError):
    """The caller must act: `resource` of `kind` is there already."""

    def __init__(self, resource: str, *, kind: str = "adapter") -> None:
        super().__init__(f"{kind} {resource!r} exists already")
        self.resource = resource
        self.kind = kind


class DuplicateRequest(AlreadyExists):
    """The caller must act: a request of this id is running or waiting."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id, kind="request")
        self.request_id = request_id


class Retryable(LoramuxError):
    """The same call may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, metadata=metadata)
        self.retry_after = retry_after


class Overloaded(Retryable):
    """The caller must wait: the queue is full."""

    def __init__(self, retry_after: float, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__("the request queue is full", retry_after=retry_after, metadata=metadata)


class Unavailable(Retryable):
    """The caller must wait or go elsewhere: the server is not able to do this now."""

    def __init__(self, message: str = "the server is not ready", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class WarmingUp(Unavailable):
    """The caller must wait: the server has started and is loading its base."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the server is warming up", retry_after=retry_after)


class Draining(Unavailable):
    """The caller must go elsewhere: the server is shutting down."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the server is shutting down", retry_after=retry_after)


class DeadlineExceeded(LoramuxError):
    """The caller's deadline passed before the answer was complete."""

    def __init__(self, message: str = "the deadline passed before the request was complete") -> None:
        super().__init__(message)


class ClientStalled(LoramuxError):
    """The caller stopped reading its stream for longer than the server waits."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"the client read nothing for {seconds:g} seconds", metadata={"stall_timeout_seconds": f"{seconds:g}"}
        )


class RequestFailed(LoramuxError):
    """One request ended badly in the engine; `failure.code` selects the status."""

    def __init__(self, failure: RequestFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class StartError(LoramuxError):
    """The operator must act: the server cannot start. `remedy` says what to do."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigInvalid(StartError):
    """The operator must act: values of the configuration are wrong."""

    @classmethod
    def of_all(cls, errors: Sequence[ConfigInvalid]) -> ConfigInvalid:
        """One error that says all of `errors`, which are not none."""
        if len(errors) == 1:
            return errors[0]
        lines = [f"  {error.message}; {error.remedy}" for error in errors]
        return cls("\n".join([f"{len(errors)} options are wrong:", *lines]), remedy="")


@dataclass(frozen=True)
class StatusMapping:
    """How an error is answered: gRPC code, HTTP status, stable reason for programs."""

    code: Code
    http: int
    reason: str


INTERNAL = StatusMapping(Code.INTERNAL, 500, "INTERNAL")
"""Of everything that is not in the table."""

_CLASSES: dict[type[Exception], StatusMapping] = {
    InvalidRequest: StatusMapping(Code.INVALID_ARGUMENT, 400, "INVALID_REQUEST"),
    NotFound: StatusMapping(Code.NOT_FOUND, 404, "NOT_FOUND"),
    AlreadyExists: StatusMapping(Code.ALREADY_EXISTS, 409, "ALREADY_EXISTS"),
    DuplicateRequest: StatusMapping(Code.ALREADY_EXISTS, 409, "DUPLICATE_REQUEST"),
    Overloaded: StatusMapping(Code.RESOURCE_EXHAUSTED, 429, "OVERLOADED"),
    Unavailable: StatusMapping(Code.UNAVAILABLE, 503, "UNAVAILABLE"),
    WarmingUp: StatusMapping(Code.UNAVAILABLE, 503, "WARMING_UP"),
    Draining: StatusMapping(Code.UNAVAILABLE, 503, "DRAINING"),
    DeadlineExceeded: StatusMapping(Code.DEADLINE_EXCEEDED, 504, "DEADLINE"),
    ClientStalled: StatusMapping(Code.ABORTED, 408, "CLIENT_STALLED"),
    adapters.AdapterInvalid: StatusMapping(Code.INVALID_ARGUMENT, 400, "ADAPTER_INVALID"),
    adapters.AdapterIncompatible: StatusMapping(Code.INVALID_ARGUMENT, 400, "ADAPTER_INCOMPATIBLE"),
    adapters.CertificateRefused: StatusMapping(Code.FAILED_PRECONDITION, 409, "CERTIFICATE_REFUSED"),
    adapters.AdapterNotFound: StatusMapping(Code.NOT_FOUND, 404, "ADAPTER_NOT_FOUND"),
    adapters.AdapterConflict: StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_CONFLICT"),
    adapters.AdapterCorrupt: StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_CORRUPT"),
    adapters.UploadOffset: StatusMapping(Code.OUT_OF_RANGE, 416, "UPLOAD_OFFSET"),
    adapters.QuotaExceeded: StatusMapping(Code.RESOURCE_EXHAUSTED, 429, "QUOTA_EXCEEDED"),
    adapters.StoreUnavailable: StatusMapping(Code.UNAVAILABLE, 503, "STORE_UNAVAILABLE"),
    adapters.StoreFull: StatusMapping(Code.UNAVAILABLE, 503, "STORE_FULL"),
    adapters.StoreCorrupt: StatusMapping(Code.UNAVAILABLE, 503, "STORE_CORRUPT"),
    adapters.PoolExhausted: StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_TOO_LARGE"),
}

_FAILURES: dict[str, StatusMapping] = {
    "DEADLINE": StatusMapping(Code.DEADLINE_EXCEEDED, 504, "DEADLINE"),
    "ABORTED": StatusMapping(Code.ABORTED, 409, "ABORTED"),
    "NUMERIC": StatusMapping(Code.FAILED_PRECONDITION, 409, "NUMERIC"),
    "OUT_OF_MEMORY": StatusMapping(Code.RESOURCE_EXHAUSTED, 429, "OUT_OF_MEMORY"),
    "OVERLOADED": StatusMapping(Code.RESOURCE_EXHAUSTED, 429, "OVERLOADED"),
    "TOO_LARGE": StatusMapping(Code.INVALID_ARGUMENT, 400, "INVALID_REQUEST"),
    "ADAPTER_INVALID": StatusMapping(Code.INVALID_ARGUMENT, 400, "ADAPTER_INVALID"),
    "ADAPTER_INCOMPATIBLE": StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_INCOMPATIBLE"),
    "ADAPTER_NOT_FOUND": StatusMapping(Code.NOT_FOUND, 404, "ADAPTER_NOT_FOUND"),
    "ADAPTER_CORRUPT": StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_CORRUPT"),
    "ADAPTER_TOO_LARGE": StatusMapping(Code.FAILED_PRECONDITION, 409, "ADAPTER_TOO_LARGE"),
    "ADAPTER_LOAD_FAILED": StatusMapping(Code.UNAVAILABLE, 503, "ADAPTER_LOAD_FAILED"),
    "ENGINE_DEAD": StatusMapping(Code.UNAVAILABLE, 503, "ENGINE_DEAD"),
    "DRAINING": StatusMapping(Code.UNAVAILABLE, 503, "DRAINING"),
    "INTERNAL": INTERNAL,
}
NOT_LOADED: Final = frozenset(code for code in _FAILURES if code.startswith("ADAPTER_"))
"""Codes of a RequestFailure by which the request's adapter could not be loaded."""


def status_of(error: BaseException) -> StatusMapping:
    """The row of `error`'s class or nearest ancestor; of a RequestFailed, of its code; else INTERNAL."""
    if isinstance(error, RequestFailed):
        return _FAILURES.get(error.failure.code, INTERNAL)
    for cls in type(error).__mro__:
        mapping = _CLASSES.get(cls)
        if mapping is not None:
            return mapping
    return INTERNAL


def failure_of(error: BaseException) -> RequestFailure:
    """`error` as a terminal of one request: an adapter's load error keeps its reason, a bug becomes INTERNAL."""
    mapping = status_of(error)
    if mapping is INTERNAL:
        return RequestFailure("INTERNAL", "internal error")
    code = mapping.reason if mapping.reason in _FAILURES else "ADAPTER_LOAD_FAILED"
    return RequestFailure(code, str(error))


def error_table() -> Mapping[str, StatusMapping]:
    """Every row, keyed by class name or failure code: for documents and tests."""
    return {**{cls.__name__: mapping for cls, mapping in _CLASSES.items()}, **_FAILURES}

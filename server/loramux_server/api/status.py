"""Errors as `google.rpc.Status`: code, message and the details a program can act on.

Knows the error table and nothing of services. What is not in the table says nothing but
the id under which the log has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from loramux_adapters.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    QuotaExceeded,
    StoreUnavailable,
    UploadOffset,
)
from loramux_server.errors import (
    INTERNAL,
    AlreadyExists,
    InvalidRequest,
    LoramuxError,
    NotFound,
    Retryable,
    StatusMapping,
    status_of,
)

DOMAIN = "loramux"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MAX_VIOLATIONS = 16
_MAX_TEXT_OF_VIOLATIONS = 2048
_MAX_TEXT = 512  # trailing metadata over 8 KiB is dropped by common clients
_STORE_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """What ends a call: status code, message and trailing metadata."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]
    mapping: StatusMapping


def answer_error(error: Exception, call_id: str) -> Answer:
    """The status of `error`. Of an error outside the table it has `call_id` alone."""
    mapping = status_of(error)
    if mapping is INTERNAL:
        message = f"internal error; request id {call_id}"
        details: list[Message] = [_info(mapping, {"request_id": call_id})]
    else:
        message = _cut(str(error))
        details = [_info(mapping, {**_facts(error), "request_id": call_id}), *_details(error, mapping)]
    status = Status(code=int(mapping.code), message=message, details=[_pack(detail) for detail in details])
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    retry = retry_after(error)
    if retry is not None:
        trailers.append((PUSHBACK_KEY, str(round(retry * 1000))))
    return Answer(_CODES[int(mapping.code)], message, tuple(trailers), mapping)


def retry_after(error: Exception) -> float | None:
    """Seconds after which the same call may succeed, None when waiting does not help."""
    if isinstance(error, Retryable):
        return error.retry_after
    return _STORE_RETRY_SECONDS if isinstance(error, StoreUnavailable) else None


def _facts(error: Exception) -> dict[str, str]:
    """What a program may want to read: limits, counts, the subject and the remedy."""
    facts = dict(error.metadata) if isinstance(error, LoramuxError) else {}
    if isinstance(error, AdapterError):
        facts |= {key: value for key, value in (("subject", error.subject), ("remedy", error.remedy)) if value}
    if isinstance(error, UploadOffset):
        facts["received"] = str(error.received)
    return {key: _cut(value) for key, value in facts.items()}


def _details(error: Exception, mapping: StatusMapping) -> list[Message]:
    details: list[Message] = []
    if isinstance(error, InvalidRequest):
        details.append(_violations(error.violations[:_MAX_VIOLATIONS], mapping))
    elif isinstance(error, AdapterInvalid | AdapterIncompatible | UploadOffset):
        details.append(_violations([(error.subject, error.message)], mapping))
    elif isinstance(error, NotFound | AlreadyExists):
        details.append(_resource(error.kind, error.resource, str(error)))
    elif isinstance(error, AdapterNotFound):
        details.append(_resource("adapter", error.subject, error.message))
    elif isinstance(error, QuotaExceeded):
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=_cut(error.subject), description=_cut(error.message)
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    retry = retry_after(error)
    if retry is not None:
        delay = Duration()
        delay.FromMilliseconds(round(retry * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _info(mapping: StatusMapping, metadata: dict[str, str]) -> Message:
    info: Message = error_details_pb2.ErrorInfo(reason=mapping.reason, domain=DOMAIN, metadata=metadata)
    return info


def _violations(violations: Sequence[tuple[str, str]], mapping: StatusMapping) -> Message:
    most = min(_MAX_TEXT, _MAX_TEXT_OF_VIOLATIONS // len(violations))
    request: Message = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(field, most), description=_cut(description, most), reason=mapping.reason
            )
            for field, description in violations
        ]
    )
    return request


def _resource(kind: str, name: str, description: str) -> Message:
    info: Message = error_details_pb2.ResourceInfo(
        resource_type=kind, resource_name=_cut(name), description=_cut(description)
    )
    return info


def _pack(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _cut(text: str, most: int = _MAX_TEXT) -> str:
    """Well-formed text of bounded length: callers' own strings come back in messages."""
    safe = text.encode("utf-8", "replace").decode("utf-8")
    return safe if len(safe) <= most else safe[: most - 1] + "…"

"""Errors on the wire: every row of the table becomes a well-formed status of bounded size."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from loramux_adapters import errors as adapter_errors
from loramux_server import errors
from loramux_server.api.status import DETAILS_KEY, DOMAIN, PUSHBACK_KEY, answer_error
from loramux_server.requests import RequestFailure

EVERY = [
    errors.InvalidRequest("a.b", "is wrong", metadata={"limit": "3"}),
    errors.NotFound("x"),
    errors.AlreadyExists("x"),
    errors.DuplicateRequest("r"),
    errors.Overloaded(0.25),
    errors.Unavailable(),
    errors.WarmingUp(),
    errors.Draining(),
    errors.DeadlineExceeded(),
    errors.ClientStalled(3.0),
    errors.RequestFailed(RequestFailure("ENGINE_DEAD", "the engine has died")),
    adapter_errors.AdapterInvalid("bad", subject="lora_A", remedy="save again"),
    adapter_errors.AdapterIncompatible("other base", subject="base"),
    adapter_errors.AdapterNotFound("no adapter 'x'", subject="x"),
    adapter_errors.AdapterConflict("in use"),
    adapter_errors.AdapterCorrupt("sha256 differs", subject="x"),
    adapter_errors.UploadOffset("gap", received=7, subject="f"),
    adapter_errors.QuotaExceeded("too many", subject="adapters"),
    adapter_errors.StoreUnavailable("disk full"),
    adapter_errors.StoreCorrupt("unreadable", remedy="loramux doctor"),
    adapter_errors.PoolExhausted("too large"),
]


def _details(error: Exception) -> tuple[Status, dict[str, object], dict[str, str | bytes]]:
    answer = answer_error(error, "call-1")
    trailers = dict(answer.trailers)
    raw = trailers[DETAILS_KEY]
    assert isinstance(raw, bytes)
    status = Status.FromString(raw)
    found: dict[str, object] = {}
    for packed in status.details:
        kind = packed.type_url.rpartition(".")[2]
        message = getattr(error_details_pb2, kind)()
        assert packed.Unpack(message)
        found[kind] = message
    assert status.code == answer.code.value[0]
    assert status.message == answer.message
    return status, found, trailers


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_every_row_is_a_whole_status(error: Exception) -> None:
    mapping = errors.status_of(error)
    status, found, trailers = _details(error)
    info = found["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, info.metadata["request_id"]) == (mapping.reason, DOMAIN, "call-1")
    assert status.code == mapping.code
    assert ("RetryInfo" in found) == (PUSHBACK_KEY in trailers)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest("a", "b"), "BadRequest"),
        (errors.NotFound("x"), "ResourceInfo"),
        (errors.DuplicateRequest("x"), "ResourceInfo"),
        (errors.Overloaded(1), "RetryInfo"),
        (adapter_errors.AdapterNotFound("x", subject="x"), "ResourceInfo"),
        (adapter_errors.AdapterInvalid("x", subject="t"), "BadRequest"),
        (adapter_errors.QuotaExceeded("x"), "QuotaFailure"),
        (adapter_errors.StoreUnavailable("x"), "RetryInfo"),
    ],
)
def test_details_a_program_can_act_on(error: Exception, kind: str) -> None:
    assert kind in _details(error)[1]


def test_a_bug_says_its_id_only() -> None:
    status, found, _ = _details(RuntimeError("/home/me/secret"))
    assert status.message == "internal error; request id call-1"
    assert list(found) == ["ErrorInfo"]
    assert "secret" not in str(status)


def test_what_callers_send_back_is_bounded_and_well_formed() -> None:
    name = "é\ud800" + "x" * 100_000
    status, _, trailers = _details(adapter_errors.AdapterNotFound(f"no adapter {name!r}", subject=name))
    assert len(status.SerializeToString()) < 6000
    assert sum(len(value) for value in trailers.values()) < 8192

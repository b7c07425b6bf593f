"""The one error table: complete, distinct, and closed against leaking bugs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from loramux_adapters import errors as adapter_errors
from loramux_server import errors
from loramux_server.errors import Code, error_table, failure_of, status_of
from loramux_server.requests import RequestFailure


def _family(root: type[Exception]) -> list[type[Exception]]:
    found: list[type[Exception]] = []
    for cls in root.__subclasses__():
        found += [cls, *_family(cls)]
    return found


def test_every_adapter_error_has_a_row_of_its_own() -> None:
    rows = error_table()
    missing = [cls.__name__ for cls in _family(adapter_errors.AdapterError) if cls.__name__ not in rows]
    assert missing == []


def test_every_server_error_that_reaches_a_client_has_a_row() -> None:
    never_told = {"StartError", "ConfigInvalid", "RequestFailed", "Retryable"}
    rows = error_table()
    missing = {cls.__name__ for cls in _family(errors.LoramuxError)} - set(rows) - never_told
    assert missing == set()


def test_reasons_are_upper_snake_and_one_reason_has_one_http_class() -> None:
    for name, mapping in error_table().items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*[A-Z0-9]", mapping.reason), name
        assert 400 <= mapping.http < 600, name
        assert mapping.code is not Code.OK


@pytest.mark.parametrize(
    ("error", "code", "http", "reason"),
    [
        (errors.InvalidRequest("sampling.top_p", "must be positive"), Code.INVALID_ARGUMENT, 400, "INVALID_REQUEST"),
        (errors.DuplicateRequest("r1"), Code.ALREADY_EXISTS, 409, "DUPLICATE_REQUEST"),
        (errors.WarmingUp(), Code.UNAVAILABLE, 503, "WARMING_UP"),
        (errors.Draining(), Code.UNAVAILABLE, 503, "DRAINING"),
        (errors.Overloaded(0.5), Code.RESOURCE_EXHAUSTED, 429, "OVERLOADED"),
        (adapter_errors.UploadOffset("x", received=3), Code.OUT_OF_RANGE, 416, "UPLOAD_OFFSET"),
        (errors.RequestFailed(RequestFailure("NUMERIC", "NaN")), Code.FAILED_PRECONDITION, 409, "NUMERIC"),
        (errors.RequestFailed(RequestFailure("NEVER_HEARD_OF", "x")), Code.INTERNAL, 500, "INTERNAL"),
        (KeyError("secret"), Code.INTERNAL, 500, "INTERNAL"),
        (adapter_errors.AdapterError("abstract"), Code.INTERNAL, 500, "INTERNAL"),
    ],
)
def test_verdict(error: Exception, code: Code, http: int, reason: str) -> None:
    mapping = status_of(error)
    assert (mapping.code, mapping.http, mapping.reason) == (code, http, reason)


def test_a_load_error_keeps_its_reason_and_a_bug_tells_nothing() -> None:
    corrupt = failure_of(adapter_errors.AdapterCorrupt("sha256 differs", subject="adapter_model.safetensors"))
    assert corrupt.code == "ADAPTER_CORRUPT"
    assert "sha256 differs" in corrupt.message
    assert failure_of(adapter_errors.StoreUnavailable("disk full")).code == "ADAPTER_LOAD_FAILED"
    bug = failure_of(RuntimeError("/secret/path"))
    assert (bug.code, bug.message) == ("INTERNAL", "internal error")


def test_errors_import_neither_torch_nor_grpc() -> None:
    script = "import sys, loramux_server.errors; print([m for m in ('torch', 'grpc', 'google') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"

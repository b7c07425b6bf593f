"""Retry decisions, error details and the download's checks, without a network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from lorica.download import Download
from lorica.errors import (
    ErrorDetails,
    InvalidArgument,
    LocalFilesError,
    NotFound,
    ResourceExhausted,
    TransferError,
    Unavailable,
    read_details,
)
from lorica.retry import NO_RETRY, RetryPolicy
from lorica_protos.v1 import adapters_pb2

POLICY = RetryPolicy(attempts=4, first=0.1, longest=1.0)


def test_only_what_may_help_is_repeated() -> None:
    assert POLICY.pause(InvalidArgument("x"), 1, idempotent=True) is None
    assert POLICY.pause(NotFound("x"), 1, idempotent=True) is None
    assert POLICY.pause(Unavailable("x"), 1, idempotent=False) is None
    assert POLICY.pause(ResourceExhausted("x"), 1, idempotent=True) is None
    assert POLICY.pause(ResourceExhausted("x", ErrorDetails(retry_after=0.5)), 1, idempotent=False) == 0.5
    assert POLICY.pause(ResourceExhausted("x", ErrorDetails(retry_after=2.0)), 1, idempotent=False) is None
    assert NO_RETRY.pause(Unavailable("x", ErrorDetails(retry_after=0.0)), 1, idempotent=True) is None


@given(st.integers(1, 10))
def test_pauses_grow_within_bounds_and_end(attempt: int) -> None:
    pause = POLICY.pause(Unavailable("x"), attempt, idempotent=True)
    if attempt >= 4:
        assert pause is None
    else:
        assert pause is not None
        assert 0.05 * 2 ** (attempt - 1) <= pause <= min(1.0, 0.1 * 2 ** (attempt - 1))


@pytest.mark.parametrize("values", [{"attempts": 0}, {"first": -1.0}, {"first": 2.0, "longest": 1.0}])
def test_a_policy_without_bounds_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="retry policy"):
        RetryPolicy(**values)


@given(st.binary(max_size=200))
def test_unreadable_details_count_as_absent(raw: bytes) -> None:
    details = read_details((("grpc-status-details-bin", raw), ("other", "x")))
    assert isinstance(details, ErrorDetails)
    assert read_details(None) == ErrorDetails()


def test_quota_failures_are_told() -> None:
    quota = error_details_pb2.QuotaFailure(
        violations=[error_details_pb2.QuotaFailure.Violation(subject="adapters", description="10 of 10 adapters")]
    )
    entry = any_pb2.Any()
    entry.Pack(quota)
    raw = status_pb2.Status(code=8, details=[entry]).SerializeToString()
    assert read_details((("grpc-status-details-bin", raw),)).quotas == ("10 of 10 adapters",)


# Download


def _manifest(*files: tuple[str, bytes]) -> adapters_pb2.DownloadAdapterResponse:
    manifest = adapters_pb2.DownloadManifest(digest="d")
    for name, data in files:
        manifest.files.add(file=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return adapters_pb2.DownloadAdapterResponse(manifest=manifest)


def _chunk(file: str, offset: int, data: bytes) -> adapters_pb2.DownloadAdapterResponse:
    return adapters_pb2.DownloadAdapterResponse(chunk=adapters_pb2.UploadChunk(file=file, offset=offset, data=data))


CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
    "messages",
    [
        [_chunk(CONFIG, 0, b"ab")],
        [_manifest((CONFIG, b"abc")), _manifest((CONFIG, b"abc"))],
        [_manifest((CONFIG, b"abc"), (CONFIG, b"abc"))],
        [_manifest()],
        [_manifest((CONFIG, b"abc")), _chunk(CONFIG, 1, b"bc")],
        [_manifest((CONFIG, b"abc")), _chunk(CONFIG, 0, b"abcd")],
        [_manifest((CONFIG, b"abc")), _chunk("lorica.json", 0, b"abc")],
        [_manifest((CONFIG, b"abc")), _chunk(CONFIG, 0, b"ab")],
        [_manifest((CONFIG, b"abc")), _chunk(CONFIG, 0, b"xyz")],
        [_manifest((CONFIG, b"abc")), adapters_pb2.DownloadAdapterResponse()],
        [],
    ],
)
def test_a_wrong_download_fails_and_leaves_nothing(
    messages: list[adapters_pb2.DownloadAdapterResponse], tmp_path: Path
) -> None:
    def receive() -> None:
        with Download(tmp_path / "d") as download:
            for message in messages:
                download.feed(message)
            download.finish()

    with pytest.raises(TransferError):
        receive()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Download(tmp_path / "file" / "d") as download, pytest.raises(LocalFilesError, match="cannot write"):
        download.feed(_manifest((CONFIG, b"abc")))

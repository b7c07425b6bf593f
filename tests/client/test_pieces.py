"""Retry decisions, error details, conversions and the download's checks, without a network."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from loramux import convert
from loramux.channel import channel_options
from loramux.cli.connecting import StartRetryPolicy
from loramux.download import Download
from loramux.errors import (
    DeadlineExceeded,
    ErrorDetails,
    InvalidArgument,
    LocalFilesError,
    NotFound,
    ResourceExhausted,
    TransferError,
    Unavailable,
    read_details,
)
from loramux.retry import NO_RETRY, Attempts, RetryPolicy
from loramux.upload import collect
from loramux_protos.v1 import adapters_pb2, inference_pb2
from loramux_server.api.grpc_server import _channel_options

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


def test_a_timeout_is_for_all_tries_together() -> None:
    attempts = Attempts(POLICY, 60.0, each=5.0)
    assert attempts.left() == 5.0
    assert attempts.pause(Unavailable("x"), idempotent=True) <= 0.1
    short = Attempts(RetryPolicy(first=0.5, longest=1.0), 0.2)
    assert 0.0 < (short.left() or 0.0) <= 0.2
    with pytest.raises(Unavailable):
        short.pause(Unavailable("x"), idempotent=True)
    assert Attempts(POLICY).left() is None


def test_a_state_that_moved_is_met_again_a_bounded_number_of_times() -> None:
    attempts = Attempts(POLICY)
    others = Attempts(RetryPolicy())
    pauses = [[each.pause(NotFound("x"), idempotent=True, moved=True) for _ in range(3)] for each in (attempts, others)]
    for own in pauses:  # of two that push the same, one goes first at last
        assert all(0.05 * 2**number <= pause <= 0.1 * 2**number for number, pause in enumerate(own))
    assert pauses[0] != pauses[1]
    with pytest.raises(NotFound):
        attempts.pause(NotFound("x"), idempotent=True, moved=True)


def test_a_try_cut_by_the_deadline_tells_what_the_one_before_it_failed_of() -> None:
    """And no more than that: the one that was cut may have been accepted."""
    cut, busy = DeadlineExceeded("cut"), Unavailable("busy")
    attempts = Attempts(POLICY, 60.0)
    attempts.pause(busy, idempotent=True)
    with pytest.raises(DeadlineExceeded) as caught:
        attempts.pause(cut, idempotent=True)
    assert caught.value is cut
    assert caught.value.__cause__ is busy


def test_warming_up_uses_up_no_attempt() -> None:
    attempts = Attempts(StartRetryPolicy())
    for _ in range(20):
        assert attempts.pause(Unavailable("x", ErrorDetails(reason="WARMING_UP")), idempotent=False) == 0.5
    assert attempts.pause(Unavailable("x"), idempotent=True) > 0


def test_pings_are_as_far_apart_as_the_server_allows() -> None:
    options, allowed = dict(channel_options("10.0.0.1:1")), dict(_channel_options(1))
    assert options["grpc.keepalive_time_ms"] >= 2 * allowed["grpc.http2.min_ping_interval_without_data_ms"]
    assert options["grpc.keepalive_timeout_ms"] > 0


# Conversions


def test_words_of_a_newer_server_are_not_a_crash() -> None:
    message = adapters_pb2.Adapter(name="a", health=77)  # type: ignore[arg-type]
    message.residency.tier, message.residency.merged = 78, 79  # type: ignore[assignment]
    adapter = convert.adapter(message)
    assert (adapter.health, adapter.residency.tier, adapter.residency.merged) == ("ok", "registered", "none")
    response = inference_pb2.GenerateStreamResponse()
    response.finish.reason = 99  # type: ignore[assignment]
    with pytest.raises(TransferError, match="reason this client does not know: '99'"):
        convert.stream_part(response)


@pytest.mark.parametrize(
    ("message", "field"),
    [({"role": "user"}, "content"), ({"content": "a"}, "role"), ({"role": 1, "content": "a"}, "role"), ("hello", "")],
)
def test_a_message_without_role_or_content_is_refused_by_its_place(message: object, field: str) -> None:
    messages = [{"role": "user", "content": "a"}, message]
    for make in (
        lambda: convert.generate_request(None, None, messages, "", {}),  # type: ignore[arg-type]
        lambda: convert.tokenize_request(None, messages),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidArgument) as caught:
            make()
        assert caught.value.violations[0].field == ".".join(filter(None, ("messages[1]", field)))


def test_a_directory_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(LocalFilesError, match="Permission denied"):
        collect(tmp_path, "a", {}, allow_base_mismatch=False)


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
        [_manifest((CONFIG, b"abc")), _chunk("loramux.json", 0, b"abc")],
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
    for directory in (tmp_path / "file", tmp_path / "file" / "d" / "e"):
        with pytest.raises(LocalFilesError, match=rf"cannot write {directory}: {tmp_path}/file is not a directory"):
            Download(directory).__enter__()


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(LocalFilesError, match=rf"cannot write {tmp_path}/d: {tmp_path} is not writable"):
        Download(tmp_path / "d").__enter__()


def test_a_target_is_judged_again_when_the_files_come(tmp_path: Path) -> None:
    with Download(tmp_path) as download:
        (tmp_path / CONFIG).write_text("the user's own")
        with pytest.raises(LocalFilesError, match=r"already holds adapter_config\.json"):
            download.feed(_manifest((CONFIG, b"abc")))
    assert (tmp_path / CONFIG).read_text() == "the user's own"


WEIGHTS = "adapter_model.safetensors"


def _pull(directory: Path, *files: tuple[str, bytes], overwrite: bool = False) -> None:
    with Download(directory, overwrite=overwrite) as download:
        download.feed(_manifest(*files))
        for name, data in files:
            download.feed(_chunk(name, 0, data))
        download.finish()


@pytest.mark.parametrize("full", [CONFIG, WEIGHTS])
def test_a_full_disk_is_told_and_leaves_the_old_files(tmp_path: Path, full: str) -> None:
    _pull(tmp_path, (CONFIG, b"old"), (WEIGHTS, b"old"))
    (tmp_path / f".{full}.part").symlink_to("/dev/full")
    with pytest.raises(LocalFilesError, match="No space left"):
        _pull(tmp_path, (CONFIG, b"new"), (WEIGHTS, b"new"), overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {CONFIG: b"old", WEIGHTS: b"old"}


def test_a_disk_that_is_full_while_bytes_come_is_told(tmp_path: Path) -> None:
    (tmp_path / f".{WEIGHTS}.part").symlink_to("/dev/full")
    with pytest.raises(LocalFilesError, match="No space left"):
        _pull(tmp_path, (CONFIG, b"new"), (WEIGHTS, bytes(1 << 20)))
    assert list(tmp_path.iterdir()) == []


def test_a_cut_between_two_renames_leaves_no_adapter(tmp_path: Path) -> None:
    _pull(tmp_path, (CONFIG, b"old"), (WEIGHTS, b"old"))
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()  # its rename fails
    with pytest.raises(LocalFilesError, match="cannot write"):
        _pull(tmp_path, (CONFIG, b"new"), (WEIGHTS, b"new"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_what_the_replaced_adapter_had_beside_it_goes(tmp_path: Path) -> None:
    _pull(tmp_path, (CONFIG, b"old"), (WEIGHTS, b"old"), ("loramux.json", b"old"))
    (tmp_path / "README.md").write_text("the user's own")
    _pull(tmp_path, (CONFIG, b"new"), (WEIGHTS, b"new"), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_a_lone_optional_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "loramux.json").write_text("the user's own")
    with pytest.raises(LocalFilesError, match=r"already holds loramux\.json"):
        _pull(tmp_path, (CONFIG, b"new"), (WEIGHTS, b"new"))
    assert (tmp_path / "loramux.json").read_text() == "the user's own"

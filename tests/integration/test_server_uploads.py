"""Uploads to the real process that are cut or break the protocol, and hostile names."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loramux import Client
from loramux.errors import InvalidArgument
from loramux.local_server import LocalServer
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc
from support.live import PROMPT, until
from support.servers import details, upload_messages
from support.tiny_adapters import CONFIG, WEIGHTS, tiny_files, write_files

FILES = tiny_files(24, rank=32)
SIZE = len(FILES[WEIGHTS])
CHUNK = 50_000
SENT = 2  # chunks of the weights before a cut
Message = adapters_pb2.UploadAdapterRequest
Stub = adapters_pb2_grpc.AdapterServiceStub


@pytest.fixture
def stub(server: LocalServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield Stub(channel)


def _id() -> str:
    return uuid.uuid4().hex


def _messages(upload_id: str, name: str = "cut", files: dict[str, bytes] = FILES) -> list[Message]:
    return upload_messages(name, files, upload_id, chunk=CHUNK)


def _chunk(file: str, offset: int, data: bytes) -> Message:
    return Message(chunk=adapters_pb2.UploadChunk(file=file, offset=offset, data=data))


def _refused(call: Callable[[], object]) -> dict[str, Any]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return details(caught.value)  # type: ignore[arg-type]


def _received(stub: Any, upload_id: str) -> dict[str, int]:
    progress = stub.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id=upload_id), timeout=20)
    return {entry.file: entry.received for entry in progress.files}


def _cut_by(end: str, stub: Any, messages: list[Message]) -> None:
    """Send `messages`, which are not all, and end the call in one of the ways a call can end."""
    if end == "half-close":
        assert _refused(lambda: stub.UploadAdapter(iter(messages), timeout=20))["code"] is (
            grpc.StatusCode.INVALID_ARGUMENT
        )
        return

    ended = threading.Event()
    upload_id = messages[0].begin.upload_id

    def endless() -> Iterator[Message]:
        yield from messages
        if end == "raise":
            arrive()
            raise OSError("the disk of the client")
        ended.wait(60)

    def arrive() -> None:
        """A cancellation drops what the server has not read yet."""
        until(has_arrived, "what was sent has arrived")

    def has_arrived() -> bool:
        try:
            received = _received(stub, upload_id)
        except grpc.RpcError:  # not begun yet
            return False
        return sum(received.values()) == sum(len(message.chunk.data) for message in messages)

    try:
        if end == "deadline":
            call = stub.UploadAdapter.future(endless(), timeout=1.8)  # below the seconds of a stall
            arrive()
            assert _refused(call.result)["code"] is grpc.StatusCode.DEADLINE_EXCEEDED
        elif end == "raise":
            _refused(lambda: stub.UploadAdapter(endless(), timeout=60))
        else:
            call = stub.UploadAdapter.future(endless(), timeout=60)
            arrive()
            call.cancel()
    finally:
        ended.set()


@pytest.mark.parametrize("end", ["half-close", "raise", "cancel", "deadline"])
def test_a_cut_upload_is_invisible_and_resumes(client: Client, stub: Any, tmp_path: Path, end: str) -> None:
    upload_id = _id()
    messages = _messages(upload_id)
    _cut_by(end, stub, messages[: 2 + SENT])  # begin, config, and some of the weights
    assert "cut" not in {adapter.name for adapter in client.adapters()}
    assert _received(stub, upload_id) == {CONFIG: len(FILES[CONFIG]), WEIGHTS: SENT * CHUNK}
    done = stub.UploadAdapter(iter([messages[0], *messages[2 + SENT :]]), timeout=20)
    assert done.created
    whole = client.push(write_files(tmp_path / "whole", FILES), "whole").adapter
    assert done.adapter.digest == whole.digest == client.verify("cut").digest
    assert _refused(lambda: _received(stub, upload_id))["code"] is grpc.StatusCode.NOT_FOUND
    client.delete("cut")
    client.delete("whole")


@pytest.mark.parametrize("offset", [0, CHUNK - 1, CHUNK + 1, SIZE])
def test_a_gap_or_an_overlap_is_refused_with_the_size_received(client: Client, stub: Any, offset: int) -> None:
    upload_id = _id()
    begin, config, first, *rest = _messages(upload_id)
    astray = [begin, config, first, _chunk(WEIGHTS, offset, b"x")]
    error = _refused(lambda: stub.UploadAdapter(iter(astray), timeout=20))
    assert (error["code"], error["ErrorInfo"].reason) == (grpc.StatusCode.OUT_OF_RANGE, "UPLOAD_OFFSET")
    assert error["ErrorInfo"].metadata["received"] == str(CHUNK)
    assert _received(stub, upload_id)[WEIGHTS] == CHUNK
    assert stub.UploadAdapter(iter([begin, *rest]), timeout=20).created
    client.delete("cut")


def _lies() -> dict[str, tuple[Iterable[Message], str]]:
    """Uploads that are not what they say, or not in the order of the protocol, and the field that is named.

    All but the last end with a commit: that alone would be refused, too.
    """

    def changed(**fields: Any) -> list[Message]:
        messages = _messages(_id())
        entry = messages[0].begin.manifest[1]
        for name, value in fields.items():
            setattr(entry, name, value)
        return messages

    begin, *chunks, commit = _messages(_id())
    return {
        "wrong sha256": (changed(sha256="0" * 64), WEIGHTS),
        "sha256 that is none": (changed(sha256="xyz"), WEIGHTS),
        "smaller than it says": (changed(size=SIZE + 1), WEIGHTS),
        "larger than it says": (changed(size=SIZE - 1), WEIGHTS),
        "no byte": (changed(size=0), WEIGHTS),
        "a byte too many": ([*_messages(_id())[:-1], _chunk(WEIGHTS, SIZE, b"x"), commit], WEIGHTS),
        "a file left out": ([begin, *(message for message in chunks if message.chunk.file != CONFIG), commit], CONFIG),
        "data after the commit": ([*_messages(_id()), _chunk(WEIGHTS, SIZE, b"x")], "commit"),
        "committed twice": ([*_messages(_id()), commit], "commit"),
        "begun twice": ([begin, begin, *chunks, commit], "begin"),
        "no begin": ([*chunks, commit], "chunk"),
        "commit alone": ([commit], "commit"),
        "an empty message": ([begin, Message(), *chunks, commit], "step"),
        "an empty chunk": ([begin, _chunk(WEIGHTS, 0, b""), *chunks, commit], "chunk.data"),
        "a chunk over a mebibyte": ([begin, *_large_chunk(), commit], "chunk.data"),
        "a file that was not announced": ([begin, _chunk("loramux.json", 0, b"{}"), *chunks, commit], "file"),
        "a bad upload id": (_messages("../up"), "begin.upload_id"),
        "nothing": ([], "commit"),
    }


def _large_chunk() -> list[Message]:
    return [_chunk(WEIGHTS, 0, b"x" * ((1 << 20) + 1))]


@pytest.mark.parametrize("case", list(_lies()))
def test_an_upload_that_is_not_what_it_says_is_refused(client: Client, stub: Any, case: str) -> None:
    messages, field = _lies()[case]
    error = _refused(lambda: stub.UploadAdapter(iter(messages), timeout=20))
    assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
    assert error["BadRequest"].field_violations[0].field == field
    assert "cut" not in {adapter.name for adapter in client.adapters()}


def test_an_upload_over_the_limit_is_refused_before_a_byte_is_sent(stub: Any) -> None:
    begin = _messages(_id())[0]
    begin.begin.manifest[1].size = 1 << 60
    error = _refused(lambda: stub.UploadAdapter(iter([begin]), timeout=20))
    assert error["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error["QuotaFailure"].violations[0].description


def test_a_wrong_file_is_sent_again_and_the_other_is_kept(client: Client, stub: Any) -> None:
    upload_id = _id()
    messages = _messages(upload_id)
    wrong = [*messages]
    wrong[2] = _chunk(WEIGHTS, 0, b"\1" * CHUNK)
    assert _refused(lambda: stub.UploadAdapter(iter(wrong), timeout=20))["code"] is grpc.StatusCode.INVALID_ARGUMENT
    assert _received(stub, upload_id) == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 0}
    assert stub.UploadAdapter(iter([messages[0], *messages[2:]]), timeout=20).created
    client.delete("cut")


@pytest.mark.parametrize("name", ["../x", "a/b", "a,b", "a\0b", "x" * 300, "\u202eabc", "\u200fabc", ".x", " ", "a b"])
def test_hostile_names_are_refused(client: Client, stub: Any, name: str, tmp_path: Path) -> None:
    for call in (
        lambda: stub.UploadAdapter(iter(_messages(_id(), name)), timeout=20),
        lambda: stub.GetAdapter(adapters_pb2.GetAdapterRequest(adapter=name), timeout=20),
        lambda: stub.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name), timeout=20),
        lambda: stub.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(name=name), timeout=20),
        lambda: stub.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(name="small", add_aliases=[name]), timeout=20),
        lambda: list(stub.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(adapter=name), timeout=20)),
    ):
        error = _refused(call)
        assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert error["BadRequest"].field_violations[0].field
    with pytest.raises(InvalidArgument):
        client.generate(PROMPT, adapter=name, max_tokens=1)
    with pytest.raises(InvalidArgument):
        client.push(write_files(tmp_path / "adapter", FILES), name)
    assert name not in {adapter.name for adapter in client.adapters()}

"""AdapterService over a real store: uploads that are cut or wrong, and what good calls give."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import grpc
import pytest
from grpc import aio

from loramux_protos.v1 import adapters_pb2, inference_pb2
from loramux_server.api.ports import AdapterState
from loramux_server.engine.plan import StepPlan
from support.engine_client import count_submissions
from support.servers import (
    BASE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Inside,
    Served,
    adapter_files,
    details,
    prompt_request,
    served,
    until,
    upload_messages,
)

pytestmark = pytest.mark.asyncio
FILES = adapter_files(b"w" * 300_000)
Message = adapters_pb2.UploadAdapterRequest


async def _fails(call: Any) -> dict[str, Any]:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return details(caught.value)


async def _upload(server: Served, messages: Iterable[Message]) -> adapters_pb2.UploadAdapterResponse:
    return await server.adapters.UploadAdapter(iter(list(messages)))


async def _push(server: Served, name: str, content: bytes, upload_id: str = "") -> adapters_pb2.Adapter:
    messages = upload_messages(name, adapter_files(content), upload_id or f"upload-{name}")
    return (await _upload(server, messages)).adapter


async def _names(server: Served) -> list[str]:
    listed = await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    return [adapter.name for adapter in listed.adapters]


async def _received(server: Served, upload_id: str = "upload-1") -> dict[str, int]:
    progress = await server.adapters.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id=upload_id))
    return {entry.file: entry.received for entry in progress.files}


def _chunk(file: str, offset: int, data: bytes) -> Message:
    return Message(chunk=adapters_pb2.UploadChunk(file=file, offset=offset, data=data))


async def test_what_was_uploaded_comes_back_byte_for_byte(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        first = await _upload(server, upload_messages("german", FILES))
        again = await _upload(server, upload_messages("german", FILES, "upload-2"))
        assert (first.created, again.created) == (True, False)
        assert first.adapter.digest == again.adapter.digest == hashlib.sha256(FILES[WEIGHTS_FILE]).hexdigest()
        received: dict[str, bytes] = {}
        manifest = None
        async for message in server.adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(adapter="german")):
            if message.HasField("manifest"):
                manifest = message.manifest
            else:
                assert len(received.get(message.chunk.file, b"")) == message.chunk.offset
                received[message.chunk.file] = received.get(message.chunk.file, b"") + message.chunk.data
        assert received == FILES
        assert manifest is not None
        assert {entry.file: entry.size for entry in manifest.files} == {name: len(FILES[name]) for name in FILES}


async def test_a_caller_who_still_writes_hears_why_it_was_refused(tmp_path: Path) -> None:
    """Under a caller who writes by itself, grpc.aio turns the status of a call that has ended into INTERNAL."""
    messages = upload_messages("german", adapter_files(b"w" * 8_000_000), chunk=500_000)
    messages[0].begin.name = "../german"

    async def write(server: Served) -> None:
        call = server.adapters.UploadAdapter()
        for message in messages:
            await call.write(message)
        await call.done_writing()
        await call

    async with served(tmp_path) as server:
        for _ in range(10):
            found = await _fails(write(server))
            assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT
            assert found["BadRequest"].field_violations[0].field == "begin.name"


@pytest.mark.parametrize("end", ["half-close", "cancel", "deadline"])
async def test_a_cut_upload_is_invisible_and_resumes(tmp_path: Path, end: str) -> None:
    messages = upload_messages("german", FILES, chunk=50_000)

    async def stuck() -> AsyncIterator[Message]:
        for message in messages[:4]:
            yield message
        await asyncio.sleep(60)

    async with served(tmp_path) as server:
        if end == "half-close":
            found = await _fails(_upload(server, messages[:4]))
            assert found["BadRequest"].field_violations[0].field == "commit"
        elif end == "deadline":
            found = await _fails(server.adapters.UploadAdapter(stuck(), timeout=0.3))
            assert found["code"] is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            call = server.adapters.UploadAdapter(stuck())
            await asyncio.sleep(0.3)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert await _names(server) == []
        assert await _received(server) == {CONFIG_FILE: 2, WEIGHTS_FILE: 100_000}
        done = await _upload(server, [messages[0], *messages[4:]])
        assert done.created
        assert await _names(server) == ["german"]
        ended = await _fails(server.adapters.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id="upload-1")))
        assert ended["code"] is grpc.StatusCode.NOT_FOUND


async def test_a_silent_uploader_is_ended(tmp_path: Path) -> None:
    async def silent() -> AsyncIterator[Message]:
        yield upload_messages("german", FILES)[0]
        await asyncio.sleep(60)

    async with served(tmp_path, stall_seconds=0.3) as server:
        found = await _fails(server.adapters.UploadAdapter(silent()))
        assert found["ErrorInfo"].reason == "CLIENT_STALLED"


@pytest.mark.parametrize("offset", [0, 99_999, 100_001])
async def test_a_gap_or_an_overlap_is_refused_with_the_size_received(tmp_path: Path, offset: int) -> None:
    async with served(tmp_path) as server:
        begin, config, *_ = upload_messages("german", FILES)
        data = FILES[WEIGHTS_FILE]
        found = await _fails(
            _upload(
                server, [begin, config, _chunk(WEIGHTS_FILE, 0, data[:100_000]), _chunk(WEIGHTS_FILE, offset, b"x")]
            )
        )
        assert found["code"] is grpc.StatusCode.OUT_OF_RANGE
        assert found["ErrorInfo"].metadata["received"] == "100000"
        assert (await _received(server))[WEIGHTS_FILE] == 100_000


async def test_a_wrong_hash_size_or_order_is_refused(tmp_path: Path) -> None:
    whole = upload_messages("german", FILES)
    begin, commit = whole[0], whole[-1]
    lying = upload_messages("german", FILES, "upload-2")
    lying[0].begin.manifest[1].sha256 = "0" * 64
    long = [*upload_messages("german", FILES, "upload-3")[:-1], _chunk(WEIGHTS_FILE, 300_000, b"x"), commit]
    missing = [message for message in upload_messages("german", FILES, "upload-4") if message.chunk.file != CONFIG_FILE]
    cases: dict[str, list[Message]] = {
        "wrong sha256": lying,
        "more than the size": long,
        "less than the size": missing,
        "data after commit": [*upload_messages("german", FILES, "upload-5"), _chunk(WEIGHTS_FILE, 300_000, b"x")],
        "commit twice": [*upload_messages("german", FILES, "upload-6"), commit],
        "begin twice": [begin, begin],
        "chunk first": [_chunk(WEIGHTS_FILE, 0, b"x")],
        "commit first": [commit],
        "empty message": [Message()],
        "empty chunk": [begin, _chunk(WEIGHTS_FILE, 0, b"")],
        "large chunk": [begin, _chunk(WEIGHTS_FILE, 0, b"x" * ((1 << 20) + 1))],
        "unknown file": [begin, _chunk("evil.bin", 0, b"x")],
        "nothing": [],
    }
    async with served(tmp_path) as server:
        for case, messages in cases.items():
            found = await _fails(_upload(server, messages))
            assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT, case
            assert await _names(server) == [], case
        assert (await _upload(server, upload_messages("german", FILES))).created


async def test_invalid_files_are_refused_with_the_file_named(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        found = await _fails(_upload(server, upload_messages("german", adapter_files(b"bad weights"))))
        assert (found["code"], found["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID")
        assert found["BadRequest"].field_violations[0].field == WEIGHTS_FILE
        assert await _names(server) == []


async def test_only_the_files_of_an_adapter_are_accepted(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        for file in ("adapter_model.bin", "../adapter_config.json", "a/b", ""):
            found = await _fails(_upload(server, upload_messages("german", {**FILES, file: b"x"})))
            assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_exceeded_quota_is_refused_with_its_numbers(tmp_path: Path) -> None:
    async with served(tmp_path, max_adapters=1) as server:
        await _push(server, "one", b"1")
        found = await _fails(_push(server, "two", b"2"))
        assert found["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found["QuotaFailure"].violations[0].description
        assert await _names(server) == ["one"]


async def test_pages_hold_every_adapter_once(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        for index in range(7):
            await _push(server, f"adapter-{index}", str(index).encode())
        names: list[str] = []
        token = ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=3, page_token=token)
            page = await server.adapters.ListAdapters(request)
            names += [adapter.name for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert names == [f"adapter-{index}" for index in range(7)]
        for wrong in ({"page_size": 0}, {"page_size": 1001}, {"page_token": "garbage"}, {"page_token": "x" * 1000}):
            found = await _fails(server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(**wrong)))
            assert found["code"] is grpc.StatusCode.INVALID_ARGUMENT


async def test_update_changes_what_it_names_and_list_tells_the_engines_truth(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        digest = (await _push(server, "german", b"1")).digest
        change = adapters_pb2.UpdateAdapterRequest(
            name="german", pinned=True, merge=True, add_aliases=["de"], set_labels={"team": "a"}
        )
        adapter = await server.adapters.UpdateAdapter(change)
        assert (adapter.pinned, list(adapter.aliases), dict(adapter.labels)) == (True, ["de"], {"team": "a"})
        assert adapter.merge
        assert adapter.residency.merged == adapters_pb2.MERGED_STATE_READY
        assert adapter.residency.tier == adapters_pb2.TIER_RESIDENT
        server.inside.states.known[digest] = AdapterState("resident", 3, 2, "refused", "no room")
        found = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter=f"de@{digest[:8]}"))
        residency = found.residency
        assert (residency.tier, residency.slot, residency.leases) == (adapters_pb2.TIER_RESIDENT, 3, 2)
        assert residency.merged_reason == "no room"
        answer = await server.inference.Generate(prompt_request(adapter="de"))
        assert answer.prompt.adapter_digest == digest


async def test_desired_state_is_of_the_name_and_outlive_the_server(tmp_path: Path) -> None:
    get = adapters_pb2.GetAdapterRequest(adapter="german")
    async with served(tmp_path) as server:
        await _push(server, "german", b"1")
        both = adapters_pb2.UpdateAdapterRequest(name="german", pinned=True, merge=True)
        await server.adapters.UpdateAdapter(both)
        switched = await _push(server, "german", b"2")
        assert (switched.pinned, switched.merge) == (True, True)
        assert switched.residency.merged == adapters_pb2.MERGED_STATE_READY
    async with served(tmp_path) as server:
        found = await server.adapters.GetAdapter(get)
        assert (found.pinned, found.merge) == (True, True)
        assert found.residency.merged == adapters_pb2.MERGED_STATE_READY
        await server.adapters.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(name="german", merge=False))
        found = await server.adapters.GetAdapter(get)
        assert (found.pinned, found.merge) == (True, False)
        assert found.residency.merged == adapters_pb2.MERGED_STATE_NONE


async def test_an_adapter_tells_the_bases_it_was_accepted_for(tmp_path: Path) -> None:
    get = adapters_pb2.GetAdapterRequest(adapter="german")
    async with served(tmp_path) as server:
        assert list((await _push(server, "german", b"1")).accepted_bases) == [BASE]
        assert (await server.inference.GetModel(inference_pb2.GetModelRequest())).fingerprint == BASE
    with closing(connect(tmp_path / "catalog.sqlite3")) as catalog, catalog:
        catalog.execute("UPDATE versions SET bases = ''")  # as an upgraded catalog has it
    async with served(tmp_path) as server:
        assert list((await server.adapters.GetAdapter(get)).accepted_bases) == []


async def test_hostile_aliases_and_labels_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await _push(server, "german", b"1")
        for wrong in (
            {"add_aliases": ["a/b"]},
            {"remove_aliases": ["\u202e"]},
            {"set_labels": {"": "x"}},
            {"set_labels": {"k": "v" * 1000}},
            {"add_aliases": ["x"] * 65},
        ):
            request = adapters_pb2.UpdateAdapterRequest(name="german", **wrong)
            assert (await _fails(server.adapters.UpdateAdapter(request)))["code"] is grpc.StatusCode.INVALID_ARGUMENT


async def test_requests_of_a_replaced_or_deleted_adapter_end_on_their_version(tmp_path: Path) -> None:
    def slow(plan: StepPlan) -> None:  # so that the requests are seen while they run
        time.sleep(0.002)

    async with served(tmp_path, Inside(before_step=slow)) as server:
        old = (await _push(server, "german", b"old")).digest
        alone = await server.inference.Generate(prompt_request("Hello", 100, adapter="german"))
        running = [
            asyncio.ensure_future(server.inference.Generate(prompt_request("Hello", 100, adapter="german")))
            for _ in range(2)
        ]
        await until(lambda: count_submissions(server.inside.client) > 0)
        new = (await _push(server, "german", b"new", "upload-new")).digest
        await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="german"))
        for answer in await asyncio.gather(*running):
            assert answer.choices[0].text == alone.choices[0].text
            assert answer.prompt.adapter_digest == old != new
        found = await _fails(server.inference.Generate(prompt_request(adapter="german")))
        assert found["code"] is grpc.StatusCode.NOT_FOUND
        gone = await _fails(server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="german")))
        assert gone["code"] is grpc.StatusCode.NOT_FOUND


async def test_uploads_are_counted_by_outcome(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await _push(server, "german", b"1")
        await _push(server, "german", b"1", "upload-again")
        await _fails(_upload(server, upload_messages("x", FILES)[:-1]))
        value = server.app.metrics.registry.get_sample_value
        assert value("loramux_uploads_total", {"outcome": "created"}) == 1
        assert value("loramux_uploads_total", {"outcome": "unchanged"}) == 1
        assert value("loramux_uploads_total", {"outcome": "invalid_request"}) == 1
        assert value("loramux_upload_bytes_total") == 2 * 3 + 300_002

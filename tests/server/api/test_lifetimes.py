"""Adapters that end by themselves, over gRPC: what a caller sets and sees, what counts as a use, what is refused."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from loramux_protos.v1 import adapters_pb2
from loramux_server.engine.plan import StepPlan
from support.engine_client import count_submissions
from support.servers import Inside, Served, adapter_files, details, prompt_request, served, until, upload_messages

pytestmark = pytest.mark.asyncio


async def push(server: Served, name: str, content: bytes = b"1", **lifetime: Any) -> adapters_pb2.Adapter:
    messages = upload_messages(name, adapter_files(content), f"upload-{name}", **lifetime)
    return (await server.adapters.UploadAdapter(iter(messages))).adapter


async def refusal(call: Any) -> dict[str, Any]:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return details(caught.value)


async def names(server: Served) -> list[str]:
    listed = await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    return [adapter.name for adapter in listed.adapters]


async def test_an_adapter_shows_when_it_ends(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        before = time.time()
        shown = await push(server, "brief", ttl_seconds=100.0, max_uses=3)
        assert before + 100 <= shown.expires.ToMicroseconds() / 1e6 <= time.time() + 100
        assert (shown.max_uses, shown.uses_left) == (3, 3)
        stays = await push(server, "stays", b"2")
        assert not any(stays.HasField(field) for field in ("expires", "max_uses", "uses_left"))
        await server.inference.Generate(prompt_request(adapter="brief"))
        [listed, _] = (await server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())).adapters
        assert (listed.uses_left, listed.expires) == (2, shown.expires)


async def test_a_time_that_is_over_ends_the_name_and_no_stream(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()

    def hold(plan: StepPlan) -> None:
        assert gate.wait(60)

    async with served(tmp_path, Inside(before_step=hold)) as server:
        await push(server, "brief")
        alone = await server.inference.Generate(prompt_request("Hello", 20, adapter="brief"))
        await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="brief"))
        gate.clear()
        await push(server, "brief", ttl_seconds=3600.0)
        running = asyncio.ensure_future(server.inference.Generate(prompt_request("Hello", 20, adapter="brief")))
        await until(lambda: count_submissions(server.inside.client) == 1)
        with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as catalog, catalog:
            catalog.execute("UPDATE lifetimes SET expires = ?", (time.time(),))
        server.inside.registry._expiry.look()
        await until(lambda: server.inside.registry._store.next_expiry() is None)
        assert await names(server) == []
        found = await refusal(server.inference.Generate(prompt_request(adapter="brief")))
        assert (found["code"], found["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
        gate.set()
        assert (await running).choices[0].text == alone.choices[0].text
        await until(lambda: server.inside.is_idle)
        await until(lambda: not list((tmp_path / "blobs").glob("*/*")))


async def test_each_accepted_request_is_one_use_and_refused_ones_are_none(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await push(server, "brief", max_uses=2)
        too_long = await refusal(server.inference.Generate(prompt_request("x" * 1000, adapter="brief")))
        assert too_long["code"] is grpc.StatusCode.INVALID_ARGUMENT
        request = prompt_request(adapter="brief")
        request.sampling.n = 3
        request.sampling.temperature = 1.0
        assert len((await server.inference.Generate(request)).choices) == 3
        async for _ in server.inference.GenerateStream(prompt_request(adapter="brief")):
            pass
        assert await names(server) == []
        found = await refusal(server.inference.Generate(prompt_request(adapter="brief")))
        assert found["code"] is grpc.StatusCode.NOT_FOUND


async def test_many_callers_at_once_never_get_more_than_the_uses(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await push(server, "brief", max_uses=5)
        calls = [server.inference.Generate(prompt_request(adapter="brief")) for _ in range(16)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 5
        assert await names(server) == []


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("ttl_seconds", 0.0, "0 is out of range: must be over 0 and at most 3.1536e+08"),
        ("ttl_seconds", -1.0, "-1 is out of range: must be over 0"),
        ("ttl_seconds", float("nan"), "nan is out of range: must be over 0"),
        ("ttl_seconds", 1e9, "1e+09 is out of range: must be over 0"),
        ("max_uses", 0, "0 is out of range: must be from 1 to 1e+09"),
        ("max_uses", 2_000_000_000, "2e+09 is out of range: must be from 1 to 1e+09"),
    ],
)
async def test_what_is_no_lifetime_is_refused_with_field_and_range(
    tmp_path: Path, field: str, value: float, rule: str
) -> None:
    async with served(tmp_path) as server:
        found = await refusal(push(server, "brief", **{field: value}))
        [violation] = found["BadRequest"].field_violations
        assert violation.field == f"begin.{field}"
        assert violation.description.startswith(rule)
        assert await names(server) == []


async def test_a_name_that_stays_is_given_no_end(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await push(server, "stays")
        found = await refusal(push(server, "stays", b"2", max_uses=1))
        assert found["code"] is grpc.StatusCode.FAILED_PRECONDITION
        assert "choose another name" in found["ErrorInfo"].metadata["remedy"]


async def test_the_metrics_keep_no_series_of_what_is_gone(tmp_path: Path) -> None:
    async with served(tmp_path) as server:

        def series() -> set[str]:
            return {
                sample.labels["adapter"]
                for family in server.app.metrics.registry.collect()
                for sample in family.samples
                if "adapter" in sample.labels
            }

        await push(server, "stays", b"stays")
        await server.inference.Generate(prompt_request(adapter="stays"))
        kept = series()
        for number in range(60):
            await push(server, f"brief-{number}", b"%d" % number, max_uses=1)
            await server.inference.Generate(prompt_request(adapter=f"brief-{number}"))
        await until(lambda: series() == kept)
        assert len(kept) == 3  # base, other, stays

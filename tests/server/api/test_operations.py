"""What operators meet beside the answers: health's List, log lines that name their request, drains, unix sockets."""

from __future__ import annotations

import asyncio
import http.client
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux import Client
from loramux_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from loramux_server.api import interceptors
from loramux_server.api.interceptors import _MOST_WAITING, ErrorInterceptor, _Call
from loramux_server.api.running_calls import RunningCalls
from loramux_server.app import App
from loramux_server.observe.logs import fields_of
from support.servers import (
    Inside,
    Served,
    adapter_files,
    details,
    prompt_request,
    serve_config,
    served,
    until,
    upload_messages,
)

pytestmark = pytest.mark.asyncio
TRACE = "0af7651916cd43dd8448eb211c80319c"


class _Lines(logging.Handler):
    """The fields of each access line, read as a formatter reads them: while its call is served."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.fields.append(fields_of(record))


@pytest.fixture
def lines() -> Any:
    handler, logger = _Lines(), logging.getLogger("loramux_server.access")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.fields
    logger.removeHandler(handler)
    logger.setLevel(level)


async def written(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The lines once there are `count`: a call's comes after its answer."""
    for _ in range(2000):
        if len(lines) < count:
            await asyncio.sleep(0.005)
    return lines


async def test_health_lists_every_service(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        listed = await health_pb2_grpc.HealthStub(server.channel).List(health_pb2.HealthListRequest())
        serving = health_pb2.HealthCheckResponse.SERVING
        services = ["", "loramux.v1.AdapterService", "loramux.v1.InferenceService"]
        assert {name: listed.statuses[name].status for name in listed.statuses} == dict.fromkeys(services, serving)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_is_one_line_with_its_ids_adapter_and_tokens(
    tmp_path: Path, lines: list[dict[str, Any]], streamed: bool
) -> None:
    async with served(tmp_path) as server:
        await server.adapters.UploadAdapter(iter(upload_messages("german", adapter_files())))
        await server.adapters.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(name="german", add_aliases=["de"]))
        lines.clear()
        metadata = (("x-request-id", "edge-7"), ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"))
        request = prompt_request("Hello", 4, adapter="de", request_id="mine-1")
        if streamed:
            _ = [part async for part in server.inference.GenerateStream(request, metadata=metadata)]
        else:
            await server.inference.Generate(request, metadata=metadata)
        [line] = await written(lines, 1)
        assert line["request_id"] == "mine-1"
        assert line["x_request_id"] == "edge-7"
        assert (line["trace_id"], line["span_id"]) == (TRACE, "b7ad6b7169203331")
        assert (line["adapter"], len(line["digest"])) == ("german", 12)
        assert (line["prompt_tokens"], line["completion_tokens"], line["finish"]) == (5, 4, "length")
        assert line["code"] == "OK"


async def test_a_refused_request_is_a_line_with_its_id_too(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    async with served(tmp_path) as server:
        with pytest.raises(aio.AioRpcError):
            await server.inference.Generate(
                prompt_request("Hello", 4, adapter="nobody", request_id="mine-2"),
                metadata=(("traceparent", "00-zz"), ("x-request-id", "e" * 500)),
            )
        [line] = await written(lines, 1)
        assert (line["request_id"], line["adapter"], line["code"]) == ("mine-2", "nobody", "NOT_FOUND")
        assert "trace_id" not in line
        assert len(line["x_request_id"]) == 128


async def test_who_waits_for_a_warm_up_is_a_line_a_method(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    release = threading.Event()
    inside = Inside()

    def build(*arguments: Any) -> Any:
        release.wait(60)
        return inside.build(*arguments)

    app = App(serve_config(tmp_path), build)
    starting = asyncio.ensure_future(app.start())
    try:
        await until(lambda: not app.address.endswith(":0"))
        for _ in range(3):  # a connection each, as a command that is run in a loop makes
            async with aio.insecure_channel(app.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                inference = inference_pb2_grpc.InferenceServiceStub(channel)
                for call in (
                    inference.Generate(prompt_request(), wait_for_ready=True),
                    inference.GetModel(inference_pb2.GetModelRequest(), wait_for_ready=True),
                ):
                    with pytest.raises(aio.AioRpcError) as caught:
                        await call
                    assert details(caught.value)["ErrorInfo"].reason == "WARMING_UP"
        told = sorted((line["method"].rpartition("/")[2], line["reason"]) for line in lines)
        assert told == [("Generate", "WARMING_UP"), ("GetModel", "WARMING_UP")]
        release.set()
        await starting
        lines.clear()
        async with aio.insecure_channel(app.address) as channel:
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(2):
                await inference.Generate(prompt_request())
        assert [line["code"] for line in await written(lines, 2)] == ["OK", "OK"]
    finally:
        release.set()
        await starting
        await app.stop()


async def test_hosts_that_wait_are_remembered_up_to_a_number(lines: list[dict[str, Any]]) -> None:
    interceptor = ErrorInterceptor()
    for host in range(_MOST_WAITING + 5):
        interceptor._end(_Call("/m", f"ipv4:10.0.{host >> 8}.{host & 255}:7", 0.0, "UNAVAILABLE", "WARMING_UP", True))
    assert len(lines) == len(interceptor._waiting) == _MOST_WAITING


async def test_every_wrong_field_is_told_at_once(tmp_path: Path) -> None:
    request = prompt_request("Hello", 4, request_id="a b", adapter="../x")
    request.sampling.temperature = -1
    request.sampling.top_p = 7
    request.stopping.min_tokens = 9
    request.response.logprobs = 1000
    async with served(tmp_path) as server:
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(request)
        fields = [v.field for v in details(caught.value)["BadRequest"].field_violations]
        wanted = ["request_id", "adapter", "sampling.temperature", "sampling.top_p", "stopping.min_tokens"]
        assert fields == [*wanted, "response.logprobs"]
        assert "temperature: -1 is out of range" in (caught.value.details() or "")
        update = adapters_pb2.UpdateAdapterRequest(name="/", add_aliases=["ok", ","], remove_aliases=[""])
        with pytest.raises(aio.AioRpcError) as caught:
            await server.adapters.UpdateAdapter(update)
        fields = [v.field for v in details(caught.value)["BadRequest"].field_violations]
        assert fields == ["name", "add_aliases[1]", "remove_aliases[0]"]


def _hammer(address: str, heard: Counter[str], stop: threading.Event) -> None:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while not stop.is_set():
            try:
                stub.Generate(prompt_request("Hello", 2), timeout=10)
                heard["OK"] += 1
            except grpc.RpcError as error:
                heard[error.code().name] += 1  # type: ignore[attr-defined]


async def test_a_process_that_drains_ends_no_call_with_cancelled(tmp_path: Path) -> None:
    """grpcio's own stop ends calls that it has accepted and not handed over with CANCELLED, which no client repeats."""
    app = App(serve_config(tmp_path), Inside().build, ends_process=True)
    await app.start()
    heard, stop = Counter[str](), threading.Event()
    threads = [threading.Thread(target=_hammer, args=(app.address, heard, stop)) for _ in range(6)]
    for thread in threads:
        thread.start()
    await until(lambda: heard["OK"] >= 60, 30)
    await app.stop()
    await until(lambda: heard["UNAVAILABLE"] >= 60, 30)
    stop.set()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert set(heard) == {"OK", "UNAVAILABLE"}
    await app._server._server.stop(None)  # this process goes on


async def _until_begun(server: Served, upload_id: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await server.adapters.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id=upload_id))
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                await asyncio.sleep(0.01)
            else:
                return


async def test_a_drain_tells_uploads_and_watches_that_do_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loramux_server.drain")
    # On a machine whose cores are all busy a last message takes longer than a server that ends will wait for.
    monkeypatch.setattr(RunningCalls.end, "__defaults__", (60.0,))
    monkeypatch.setattr(interceptors, "_ABORT_SECONDS", 60.0)
    async with served(tmp_path) as server:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        upload = server.adapters.UploadAdapter()
        await upload.write(upload_messages("a", adapter_files())[0])
        await _until_begun(server, "upload-1")  # else it is refused at the door, which cuts nothing off
        stopping = asyncio.ensure_future(server.app.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in (upload, watch.read()):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            told = details(caught.value)
            assert told["code"] is grpc.StatusCode.UNAVAILABLE
            assert told["ErrorInfo"].reason == "DRAINING"
            assert "RetryInfo" in told
        await stopping
    fields = {record.message: record.fields for record in caplog.records}["drained"]  # type: ignore[attr-defined]
    assert (fields["finished"], fields["cut_off"], fields["calls_cut_off"]) == (0, 0, 1)  # a watch has no end


async def test_a_unix_socket_serves_and_is_not_taken_from_a_running_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s.sock"
    async with served(tmp_path / "data", listen=address) as server:
        assert server.app.address == address
        request = inference_pb2.TokenizeRequest(text="Hi")
        assert len((await server.inference.Tokenize(request)).token_ids) == 2

        def ask() -> str:
            with Client(address) as client:
                assert client.is_healthy()
                return client.generate("Hello", temperature=0.0, max_tokens=3, ignore_eos=True).text

        assert len(await asyncio.to_thread(ask)) > 0
    assert not (tmp_path / "s.sock").exists()


async def test_probes_and_names_over_http(tmp_path: Path) -> None:
    inside = Inside()
    app = App(serve_config(tmp_path, metrics_listen="127.0.0.1:0"), inside.build)
    built = asyncio.ensure_future(app.start())
    inside.build_seconds = 0.3
    await until(lambda: bool(app.metrics_address))
    try:
        assert await _statuses(app.metrics_address) == (200, 503)
        await built
        assert await _statuses(app.metrics_address) == (200, 200)
        async with aio.insecure_channel(app.address) as channel:
            adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
            published = await adapters.UploadAdapter(iter(upload_messages("german", adapter_files())))
            await adapters.UpdateAdapter(adapters_pb2.UpdateAdapterRequest(name="german", add_aliases=["de"]))
            await inference_pb2_grpc.InferenceServiceStub(channel).Generate(prompt_request(adapter="de"))
        digest = published.adapter.digest
        wanted = f'loramux_adapter_info{{adapter="{digest[:12]}",aliases="de",digest="{digest}",name="german"}} 1.0'
        while wanted not in (await _get(app.metrics_address, "/metrics"))[1]:
            await until(lambda: app.metrics.per_adapter()[0].get(digest, 0) > 0)
        app.request_stop(1)
        assert (await _statuses(app.metrics_address))[0] == 503
    finally:
        await app.stop()


async def _statuses(address: str) -> tuple[int, int]:
    return (await _get(address, "/healthz"))[0], (await _get(address, "/readyz"))[0]


async def _get(address: str, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        connection = http.client.HTTPConnection(address, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(ask)

"""Bad requests against a real server over the fake runner: each is refused with its field."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux_protos.v1 import adapters_pb2, inference_pb2
from loramux_server.app import App
from loramux_server.engine.plan import StepPlan
from loramux_server.requests import RequestFailure
from support.servers import (
    FakeTokenizer,
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
GENERATE = "/loramux.v1.InferenceService/Generate"
STREAM = "/loramux.v1.InferenceService/GenerateStream"


async def _fails(call: Any) -> dict[str, Any]:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return {**details(caught.value), "message": caught.value.details()}


async def _lives(server: Served) -> None:
    answer = await server.inference.Generate(prompt_request())
    assert answer.choices[0].finish.usage.completion_tokens == 4


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd", b"\x1a\xff\xff\xff\xff\x0f"])
async def test_garbage_and_invalid_utf8_are_refused(tmp_path: Path, garbage: bytes) -> None:
    async with served(tmp_path) as server:
        error = await _fails(server.channel.unary_unary(GENERATE)(garbage))
        assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert error["ErrorInfo"].reason == "INVALID_REQUEST"
        assert "Error" not in error["message"]
        stream = server.channel.unary_stream(STREAM)(garbage)
        assert (await _fails(stream.read()))["code"] is grpc.StatusCode.INVALID_ARGUMENT
        upload = server.channel.stream_unary("/loramux.v1.AdapterService/UploadAdapter")(iter([garbage]))
        assert (await _fails(upload))["code"] is grpc.StatusCode.INVALID_ARGUMENT
        await _lives(server)


async def test_oversized_messages_and_unknown_methods_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        large = prompt_request("x" * (5 << 20))
        assert (await _fails(server.inference.Generate(large)))["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = (("x-large", "v" * (64 << 10)),)
        error = await _fails(server.inference.Generate(prompt_request(), metadata=metadata))
        assert error["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = await _fails(server.channel.unary_unary("/loramux.v1.InferenceService/Nope")(b""))
        assert error["code"] is grpc.StatusCode.UNIMPLEMENTED
        await _lives(server)


async def test_an_internal_error_shows_a_request_id_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Buggy(FakeTokenizer):
        def encode(self, text: str) -> list[int]:
            if text == "bug":
                raise KeyError("/secret/path")
            return super().encode(text)

    async with served(tmp_path, Inside(tokenizer=Buggy())) as server:
        other = asyncio.ensure_future(server.inference.Generate(prompt_request(max_tokens=40)))
        error = await _fails(server.inference.Generate(prompt_request("bug")))
        assert error["code"] is grpc.StatusCode.INTERNAL
        assert "secret" not in str(error)
        assert "KeyError" not in str(error)
        call_id = error["ErrorInfo"].metadata["request_id"]
        assert call_id in error["message"]
        assert (await other).choices[0].finish.usage.completion_tokens == 40
        assert any(record.exc_info and "unexpected" in record.message for record in caplog.records)


async def test_a_failing_step_ends_its_own_request_only(tmp_path: Path) -> None:
    def numeric(plan: StepPlan) -> Mapping[str, RequestFailure]:
        failure = RequestFailure("NUMERIC", "the logits are not finite")
        return {chunk.request_id: failure for chunk in plan.chunks if chunk.params.seed == 666}

    bad = prompt_request()
    bad.sampling.seed = 666

    async with served(tmp_path, Inside(before_step=numeric)) as server:
        good = asyncio.ensure_future(server.inference.Generate(prompt_request(max_tokens=20)))
        error = await _fails(server.inference.Generate(bad))
        assert (error["code"], error["ErrorInfo"].reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NUMERIC")
        stream = server.inference.GenerateStream(bad)
        assert (await _fails(stream.read()))["ErrorInfo"].reason == "NUMERIC"
        alone = await server.inference.Generate(prompt_request(max_tokens=20))
        assert (await good).choices[0].text == alone.choices[0].text


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("sampling.temperature", {"sampling": {"temperature": math.nan}}),
        ("sampling.top_p", {"sampling": {"top_p": -1.0}}),
        ("sampling.n", {"sampling": {"n": 0}}),
        ("sampling.n", {"sampling": {"n": 1 << 31}}),
        ("response.logprobs", {"response": {"logprobs": 1_000_000}}),
        ("stopping.stop_strings[0]", {"stopping": {"stop_strings": [""]}}),
        ("stopping.stop_strings", {"stopping": {"stop_strings": ["x"] * 100}}),
        ("sampling.logit_bias[0]", {"sampling": {"logit_bias": {70: 1.0}}}),
    ],
)
async def test_fields_are_refused_by_path(tmp_path: Path, path: str, change: dict[str, Any]) -> None:
    async with served(tmp_path) as server:
        request = inference_pb2.GenerateRequest(text="Hello", **change)
        error = await _fails(server.inference.Generate(request))
        assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert error["BadRequest"].field_violations[0].field == path
        stream = server.inference.GenerateStream(request)
        assert (await _fails(stream.read()))["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert server.inside.is_idle


async def test_neighbors_of_a_bad_token_id_are_equal(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        alone = await server.inference.Generate(prompt_request(max_tokens=30))
        neighbor = asyncio.ensure_future(server.inference.Generate(prompt_request(max_tokens=30)))
        bad = inference_pb2.GenerateRequest(token_ids={"ids": [1, 4_000_000_000]})
        error = await _fails(server.inference.Generate(bad))
        assert error["BadRequest"].field_violations[0].field == "token_ids.ids[1]"
        assert (await neighbor).choices[0].text == alone.choices[0].text


async def test_impossible_prompts_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(context_tokens=64)) as server:
        for request, limit in (
            (inference_pb2.GenerateRequest(), None),
            (inference_pb2.GenerateRequest(text=""), None),
            (inference_pb2.GenerateRequest(token_ids={}), None),
            (inference_pb2.GenerateRequest(chat={}), None),
            (prompt_request("x" * 64), "context_tokens"),
            (prompt_request("x" * 60, max_tokens=5), "context_tokens"),
        ):
            error = await _fails(server.inference.Generate(request))
            assert error["code"] is grpc.StatusCode.INVALID_ARGUMENT
            if limit:
                assert error["ErrorInfo"].metadata[limit] == "64"
        rest = prompt_request("x" * 50)
        rest.stopping.ClearField("max_tokens")
        answer = await server.inference.Generate(rest)
        assert answer.choices[0].finish.usage.completion_tokens == 14
        assert answer.choices[0].finish.reason == inference_pb2.FINISH_REASON_LENGTH


async def test_a_request_that_cannot_fit_the_empty_cache_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(context_tokens=128, kv_blocks=8)) as server:
        error = await _fails(server.inference.Generate(prompt_request("x" * 40)))
        assert error["ErrorInfo"].metadata["kv_cache_tokens"] == "32"
        answer = await server.inference.Generate(prompt_request("x" * 30, max_tokens=3))
        assert answer.choices[0].finish.usage.completion_tokens == 3


async def test_unknown_and_unfinished_adapters_are_never_the_base(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        unfinished = upload_messages("half", adapter_files())[:-1]
        with pytest.raises(aio.AioRpcError):
            await server.adapters.UploadAdapter(iter(unfinished))
        for reference in ("nobody", "half", "half@0123456789"):
            error = await _fails(server.inference.Generate(prompt_request(adapter=reference)))
            assert error["code"] is grpc.StatusCode.NOT_FOUND
            assert error["ResourceInfo"].resource_type == "adapter"
        assert sum(bool(plan.chunks) for plan in server.inside.runner.plans) == 1  # the warm-up's


async def test_an_unknown_adapter_is_answered_with_the_nearest(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await server.adapters.UploadAdapter(iter(upload_messages("german", adapter_files())))
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(prompt_request(adapter="germn"))
        assert caught.value.details() == "no adapter 'germn'; did you mean 'german'?"
        assert details(caught.value)["ResourceInfo"].resource_name == "germn"
        assert details(caught.value)["ErrorInfo"].metadata["remedy"] == "did you mean 'german'?"


@pytest.mark.parametrize("name", ["../x", "a/b", "a,b", "a\0b", "x" * 300, "\u202eabc"])
async def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    async with served(tmp_path) as server:
        for call in (
            server.inference.Generate(prompt_request(adapter=name)),
            server.adapters.UploadAdapter(iter(upload_messages(name, adapter_files()))),
            server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter=name)),
        ):
            assert (await _fails(call))["code"] is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_is_not_serving_until_warm(tmp_path: Path) -> None:
    inside = Inside(build_seconds=0.5)
    app = App(serve_config(tmp_path), inside.build)
    starting = asyncio.ensure_future(app.start())
    try:
        await until(lambda: not app.address.endswith(":0"))
        async with aio.insecure_channel(app.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            check = health_pb2.HealthCheckRequest()
            before = await health.Check(check, wait_for_ready=True)
            assert before.status == health_pb2.HealthCheckResponse.NOT_SERVING
            server = Served(app, inside, channel)
            error = await _fails(server.inference.Generate(prompt_request()))
            assert error["code"] is grpc.StatusCode.UNAVAILABLE
            assert error["RetryInfo"].retry_delay.seconds == 1
            assert error["pushback"] == 1000
            watch = aiter(health.Watch(check))
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await starting
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
            after = await health.Check(health_pb2.HealthCheckRequest(service="loramux.v1.InferenceService"))
            assert after.status == health_pb2.HealthCheckResponse.SERVING
            await _lives(server)
    finally:
        await starting
        await app.stop()

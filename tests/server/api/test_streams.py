"""Streams that end early, overload and shutdown, over the fake runner."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc import aio

from loramux_protos.v1 import inference_pb2
from loramux_server import drain
from loramux_server.app import App
from loramux_server.engine.plan import StepPlan
from support.engine_client import count_submissions
from support.servers import FakeTokenizer, Inside, Served, details, prompt_request, serve_config, served, until

pytestmark = pytest.mark.asyncio


def _slow(seconds: float) -> Any:
    return lambda plan: time.sleep(seconds)


def _long(**more: Any) -> inference_pb2.GenerateRequest:
    return prompt_request("Hello", 120, **more)


def _calls(server: Served, code: str) -> float:
    labels = {"method": "/loramux.v1.InferenceService/GenerateStream", "code": code}
    return server.app.metrics.registry.get_sample_value("loramux_calls_total", labels) or 0.0


def _ended(server: Served, outcome: str) -> float:
    labels = {"outcome": outcome}
    return server.app.metrics.registry.get_sample_value("loramux_sequences_total", labels) or 0.0


async def test_a_deadline_shorter_than_the_prefill_frees_everything(tmp_path: Path) -> None:
    steps: list[int] = []

    def slowly(plan: StepPlan) -> None:
        steps.append(plan.step)
        time.sleep(0.05)

    async with served(tmp_path, Inside(before_step=slowly), max_batch_tokens=8) as server:
        before = len(steps)
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(prompt_request("x" * 100, 10), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: server.inside.is_idle)
        assert len(steps) - before < 13  # the prompt alone takes that many
        await server.inference.Generate(prompt_request("Hello", 2))


async def test_a_cancelled_stream_is_aborted_and_freed(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(before_step=_slow(0.005))) as server:
        alone = await server.inference.Generate(_long())
        neighbor = asyncio.ensure_future(server.inference.Generate(_long()))
        stream = server.inference.GenerateStream(_long())
        await stream.read()
        stream.cancel()
        await until(lambda: _ended(server, "aborted") == 1)
        assert (await neighbor).choices[0].text == alone.choices[0].text
        await until(lambda: server.inside.is_idle)


async def test_the_stream_of_a_client_that_goes_away_is_aborted(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(before_step=_slow(0.005))) as server:
        async with aio.insecure_channel(server.app.address) as channel:
            stream = Served(server.app, server.inside, channel).inference.GenerateStream(_long())
            await stream.read()
        await until(lambda: server.inside.is_idle)
        assert _ended(server, "aborted") == 1


async def test_the_stream_of_a_client_that_stops_reading_is_ended(tmp_path: Path) -> None:
    """An echo of two megabytes in twelve choices fills the transport's window, and then nobody reads."""

    class Short(FakeTokenizer):
        longest_token = 1 << 20

        def encode(self, text: str) -> list[int]:
            return super().encode(text[:5])

    async with served(tmp_path, Inside(tokenizer=Short()), stall_seconds=0.3) as server:
        request = prompt_request("x" * (2 << 20), 3, response={"echo": True})
        request.sampling.n = 12
        options = [("grpc.max_receive_message_length", -1)]
        async with aio.insecure_channel(server.app.address, options=options) as channel:
            stream = Served(server.app, server.inside, channel).inference.GenerateStream(request)
            await stream.wait_for_connection()
            await until(lambda: _calls(server, "ABORTED") == 1)
            await server.inference.Generate(prompt_request())
            assert count_submissions(server.inside.client) == 0
            with pytest.raises(aio.AioRpcError) as caught:
                async for _ in stream:
                    pass
            assert details(caught.value)["ErrorInfo"].reason == "CLIENT_STALLED"
        await until(lambda: server.inside.is_idle)


async def test_ten_times_the_concurrency_is_refused_fast(tmp_path: Path) -> None:
    """Also while a step takes long: no refusal waits for one."""
    go = threading.Event()
    go.set()  # for the step that the server tries itself before it is ready
    inside = Inside(before_step=lambda plan: go.wait(60) and None)
    async with served(tmp_path, inside, max_running=4, max_queued=4) as server:
        go.clear()
        refused = 0
        admitted: list[int] = []

        async def one() -> None:
            nonlocal refused
            try:
                answer = await server.inference.Generate(prompt_request("Hello", 20))
            except aio.AioRpcError as error:
                found = details(error)
                assert found["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert found["ErrorInfo"].reason == "OVERLOADED"
                assert found["RetryInfo"].retry_delay.ToMilliseconds() == found["pushback"] > 0
                refused += 1
            else:
                admitted.append(answer.choices[0].finish.usage.completion_tokens)

        calls = asyncio.gather(*(one() for _ in range(80)))
        try:
            await until(lambda: refused == 72)
            assert admitted == []
        finally:
            go.set()
        await calls
        assert refused == 72
        assert admitted == [20] * 8


async def test_many_opened_and_cancelled_streams_leak_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, Inside(before_step=_slow(0.001)), max_queued=500) as server:
        process = psutil.Process()
        await server.inference.Generate(prompt_request())
        idle = len(asyncio.all_tasks())  # grpc keeps a task per method

        async def open_and_cancel() -> None:
            stream = server.inference.GenerateStream(_long())
            await asyncio.sleep(0.001)
            stream.cancel()

        async def wave() -> int:
            await asyncio.gather(*(open_and_cancel() for _ in range(100)))
            await until(lambda: server.inside.is_idle and count_submissions(server.inside.client) == 0)
            await until(lambda: len(asyncio.all_tasks()) <= idle + 2)  # or the test fails here
            return process.num_fds()

        before = await wave()
        for _ in range(3):
            after = await wave()
        assert after <= before + 2
        assert server.inside.pool.leased == 0
        await server.inference.Generate(prompt_request())  # its steps tell the runner who has left
        assert len(server.inside.runner.known) <= 1


async def test_idle_connections_cost_a_descriptor_and_no_task(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        await server.inference.Generate(prompt_request())
        tasks, descriptors = len(asyncio.all_tasks()), psutil.Process().num_fds()
        channels = [
            aio.insecure_channel(server.app.address, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(100)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        assert len(asyncio.all_tasks()) <= tasks + 2
        await asyncio.gather(*(channel.close() for channel in channels))
        del channels
        await until(lambda: psutil.Process().num_fds() <= descriptors + 4)


async def test_a_drain_lets_streams_end_and_refuses_new_work(tmp_path: Path) -> None:
    inside = Inside(before_step=_slow(0.01))
    app = App(serve_config(tmp_path, readiness_seconds=0.2, drain_seconds=10), inside.build)
    await app.start()
    serving = asyncio.ensure_future(app.serve())
    async with aio.insecure_channel(app.address) as channel:
        server = Served(app, inside, channel)
        running = asyncio.ensure_future(server.inference.Generate(_long()))
        await until(lambda: count_submissions(inside.client) == 1)
        app.request_stop()
        await asyncio.sleep(0.05)
        early = await server.inference.Generate(prompt_request("Hello", 2))  # within the readiness period
        assert early.choices[0].finish.usage.completion_tokens == 2
        await asyncio.sleep(0.3)
        with pytest.raises(aio.AioRpcError) as caught:
            await server.inference.Generate(prompt_request())
        found = details(caught.value)
        assert (found["code"], found["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert "RetryInfo" in found
        answer = await running
        assert answer.choices[0].finish.usage.completion_tokens == 120
        assert await serving == 0


async def test_a_stream_longer_than_the_grace_period_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drain, "_REPORT_SECONDS", 0.0)  # so that one report at least comes before the end
    caplog.set_level("INFO", "loramux_server.drain")
    inside = Inside(before_step=_slow(0.03))
    app = App(serve_config(tmp_path, drain_seconds=0.3), inside.build)
    await app.start()
    serving = asyncio.ensure_future(app.serve())
    async with aio.insecure_channel(app.address) as channel:
        stream = aiter(Served(app, inside, channel).inference.GenerateStream(_long()))
        await anext(stream)
        app.request_stop()
        last = [message async for message in stream][-1]
        assert last.finish.reason == inference_pb2.FINISH_REASON_ABORTED
        assert await serving == 0
    first, *still, end = [(record.message, record.fields) for record in caplog.records]  # type: ignore[attr-defined]
    assert first == ("draining", {"requests": 1, "seconds": 0.3})
    assert {(message, fields["requests"]) for message, fields in still} >= {("still draining", 1)}
    assert (end[0], end[1]["finished"], end[1]["cut_off"]) == ("drained", 0, 1)
    assert end[1]["seconds"] >= 0.3
    assert "calls_cut_off" not in end[1]


async def test_the_engines_death_ends_every_request_and_the_server(tmp_path: Path) -> None:
    inside = Inside(before_step=_slow(0.01))
    app = App(serve_config(tmp_path), inside.build)
    await app.start()
    serving = asyncio.ensure_future(app.serve())
    async with aio.insecure_channel(app.address) as channel:
        running = asyncio.ensure_future(Served(app, inside, channel).inference.Generate(_long()))
        await until(lambda: count_submissions(inside.client) == 1)

        def die(now: float) -> Any:
            raise MemoryError("the scheduler broke")

        inside.scheduler.plan = die  # type: ignore[method-assign]
        with pytest.raises(aio.AioRpcError) as caught:
            await running
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(caught.value)["ErrorInfo"].reason == "ENGINE_DEAD"
        assert await serving == 1


async def test_a_step_that_hangs_ends_the_server(tmp_path: Path) -> None:
    hanging, released = threading.Event(), threading.Event()
    inside = Inside(before_step=lambda plan: hanging.is_set() and released.wait(60) and None)
    app = App(serve_config(tmp_path, step_timeout_seconds=1), inside.build)
    await app.start()
    serving = asyncio.ensure_future(app.serve())
    async with aio.insecure_channel(app.address) as channel:
        hanging.set()
        with pytest.raises(aio.AioRpcError) as caught:
            await Served(app, inside, channel).inference.Generate(prompt_request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(caught.value)["ErrorInfo"].reason == "ENGINE_DEAD"
        assert await serving == 1
        assert not inside.scheduler.is_idle  # the step hangs still
    released.set()
    await until(lambda: inside.scheduler.is_idle)

"""The loop on its thread: idleness, wake-ups, faults, death, stop, and what observers are told."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from loramux_adapters.errors import AdapterCorrupt
from loramux_server.engine.plan import StepPlan, StepResult
from loramux_server.engine.stream import RequestStream
from loramux_server.errors import Unavailable
from loramux_server.requests import FinishReason, RequestFailure, TokenEvent
from support.engine_client import count_choices, count_submissions
from support.engine_thread import Running, running
from support.fake_pool import FakePool
from support.fake_runner import solo
from support.scheduler_harness import digest, limits, submission

pytestmark = pytest.mark.asyncio


async def read(stream: RequestStream) -> list[TokenEvent]:
    return await asyncio.wait_for(_read(stream), 20)


async def _read(stream: RequestStream) -> list[TokenEvent]:
    return [event async for event in stream]


async def until_asked(server: Running, digest_: str) -> None:
    for _ in range(1000):
        if digest_ in server.pool.loading:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the pool was never asked")


async def test_an_idle_engine_checks_its_books_once_and_dies_of_what_it_finds():
    async with running() as server:
        checks = list[bool]()
        check = server.scheduler.check

        def checking() -> None:
            check()
            checks.append(server.scheduler.is_idle)

        server.scheduler.check = checking  # type: ignore[method-assign]
        await read(server.client.submit(submission(max_tokens=9)))
        await asyncio.sleep(0.3)  # six beats of its heart
        assert checks == [True]
        taken = server.scheduler.tables.pool.allocate(1)  # a block that nobody will give back
        assert taken
        events = server.client.submit(submission("last"))
        await read(events)
        for _ in range(1000):
            if not server.deaths:
                await asyncio.sleep(0.005)
        assert [str(error) for error in server.deaths] == ["1 KV blocks are held and no request is live"]


@pytest.mark.parametrize("what", ["commands", "background"])
async def test_an_idle_engine_does_what_waits_and_sleeps_again(what: str):
    """Adapters come and go without a request; none of it is reported as a step."""
    async with running() as server:
        await read(server.client.submit(submission()))
        seen = len(server.runner.plans)
        for _ in range(1000):  # a step is reported after its tokens are out
            if len(server.watch.steps) < seen:
                await asyncio.sleep(0.005)
        done = threading.Event()
        if what == "commands":
            server.pool.take_bindings = lambda: ((3,), ()) if not done.is_set() else ((), ())  # type: ignore[method-assign]
        else:
            server.runner.is_busy = True
        execute = server.runner.execute

        def executing(plan: StepPlan) -> StepResult:
            if len(server.runner.plans) == seen + 4:
                server.runner.is_busy = False
                done.set()
            return execute(plan)

        server.runner.execute = executing  # type: ignore[method-assign]
        server.mailbox.notify()
        assert await asyncio.to_thread(done.wait, 20)
        await asyncio.sleep(0.2)
        plans = server.runner.plans[seen:]
        assert len(plans) <= 6
        assert all(not plan.chunks for plan in plans)
        assert len({plan.step for plan in plans}) == len(plans)
        assert all((plan.unbind == (3,)) == (what == "commands") for plan in plans[:4])
        assert len(server.watch.steps) == seen
        await read(server.client.submit(submission("again")))


async def test_an_idle_engine_sleeps_and_its_heart_beats():
    async with running() as server:
        await read(server.client.submit(submission()))
        turns = threading.Event()
        plan = server.scheduler.plan
        count = 0

        def counting(now: float) -> StepPlan:
            nonlocal count
            count += 1
            turns.set()
            return plan(now)

        server.scheduler.plan = counting  # type: ignore[method-assign]
        before = server.engine.heartbeat
        await asyncio.sleep(0.4)
        assert 1 <= count <= 12, "a beat each 50 ms, no spinning"
        assert server.engine.heartbeat > before
        assert server.engine.is_alive


async def test_a_finished_load_wakes_the_engine():
    async with running(pool=FakePool(1)) as server:
        what = submission(digest=digest(1))
        stream = server.client.submit(what)
        await until_asked(server, digest(1))
        server.pool.report(digest(1))
        server.mailbox.notify()
        assert [event.token for event in await read(stream)] == solo(what)[0]


async def test_a_failed_load_reaches_its_reader():
    async with running(pool=FakePool(1)) as server:
        stream = server.client.submit(submission(digest=digest(1)))
        await until_asked(server, digest(1))
        server.pool.report(digest(1), AdapterCorrupt("the stored bytes do not match"))
        server.mailbox.notify()
        (event,) = await read(stream)
        assert event.failure == RequestFailure("ADAPTER_CORRUPT", "the stored bytes do not match")


async def test_deadlines_are_met_while_nothing_runs():
    async with running(pool=FakePool(1)) as server:
        started = time.monotonic()
        stream = server.client.submit(submission(digest=digest(1), deadline=started + 0.15))
        (event,) = await read(stream)
        assert event.failure is not None
        assert event.failure.code == "DEADLINE"
        assert 0.14 <= time.monotonic() - started < 10.0


async def test_a_crashing_step_ends_its_requests_and_the_engine_lives():
    async with running() as server:

        def crash(plan: StepPlan) -> dict[str, RequestFailure]:
            raise RuntimeError("secret of the device")

        server.runner.inject = crash
        (event,) = await read(server.client.submit(submission("a")))
        assert event.failure is not None
        assert event.failure.code == "INTERNAL"
        assert "secret" not in event.failure.message
        server.runner.inject = None
        what = submission("b")
        assert [event.token for event in await read(server.client.submit(what))] == solo(what)[0]
    assert server.deaths == []


async def test_when_the_loop_dies_every_request_hears_of_it_once():
    async with running(limits(max_running=2)) as server:
        gate = threading.Event()

        def hold(plan: StepPlan) -> dict[str, RequestFailure]:
            gate.wait(20)
            return {}

        server.runner.inject = hold
        streams = [server.client.submit(submission(f"r{number}", n=1 + number % 2)) for number in range(5)]

        def broken(*args: object) -> None:
            raise ZeroDivisionError("a bug")

        server.scheduler.commit = broken  # type: ignore[method-assign]
        late = server.client.submit(submission("late"))
        gate.set()
        for stream in [*streams, late]:
            events = await read(stream)
            assert len(events) == stream.submission.n
            assert {event.failure.code for event in events if event.failure} == {"ENGINE_DEAD"}
            assert {event.choice for event in events} == set(range(stream.submission.n))
        with pytest.raises(Unavailable):
            server.client.submit(submission("after"))
        assert not server.client.abort("default", "r1")
    assert [type(error) for error in server.deaths] == [ZeroDivisionError]
    assert not server.engine.is_alive


async def test_a_hanging_step_shows_in_the_heartbeat_and_stop_says_so():
    async with running() as server:
        gate, entered = threading.Event(), threading.Event()

        def hang(plan: StepPlan) -> dict[str, RequestFailure]:
            entered.set()
            gate.wait(20)
            return {}

        server.runner.inject = hang
        stream = server.client.submit(submission())
        assert await asyncio.to_thread(entered.wait, 20)
        await asyncio.sleep(0.1)
        assert time.monotonic() - server.engine.heartbeat >= 0.1
        assert not await asyncio.to_thread(server.engine.stop, 0.0, 0.05)
        gate.set()
        assert (await read(stream))[-1].finish is FinishReason.ABORTED


async def test_stop_lets_requests_end_within_the_grace():
    async with running() as server:
        what = submission(max_tokens=30)
        stream = server.client.submit(what)
        assert await asyncio.to_thread(server.engine.stop, 20.0, 20.0)
        assert [event.token for event in await read(stream)] == solo(what)[0]
        assert await asyncio.to_thread(server.engine.stop, 0.0, 1.0), "again is harmless"


async def test_stop_aborts_what_is_left_after_the_grace():
    async with running(pool=FakePool(1)) as server:
        stream = server.client.submit(submission(digest=digest(1), n=2))
        assert await asyncio.to_thread(server.engine.stop, 0.05, 20.0)
        assert [event.finish for event in await read(stream)] == [FinishReason.ABORTED] * 2
        with pytest.raises(Unavailable):
            server.client.submit(submission("after"))
    assert server.deaths == []


async def test_one_wake_up_of_the_event_loop_per_step():
    async with running() as server:
        published: list[int] = []
        publish = server.client.publish

        def counting(events: list[tuple[int, TokenEvent]]) -> None:
            published.append(len(events))
            publish(events)

        server.client.publish = counting  # type: ignore[method-assign, assignment]
        streams = [server.client.submit(submission(f"r{number}", prompt=[number] * 3)) for number in range(4)]
        await asyncio.gather(*(read(stream) for stream in streams))
        assert len(published) == len(server.runner.plans)
        assert sum(published) == 16


async def test_observers_hear_of_every_step_and_request():
    async with running() as server:
        await read(server.client.submit(submission("a", prompt=9, max_tokens=3, digest=digest(1))))
        await read(server.client.submit(submission("b", prompt=9, max_tokens=1, digest=digest(1))))
        for _ in range(200):
            if len(server.watch.steps) == 4:
                break
            await asyncio.sleep(0.01)
    steps = server.watch.steps
    assert [(stats.tokens, stats.prefill_chunks, stats.decode_chunks) for stats in steps] == [
        (9, 1, 0),
        (1, 0, 1),
        (1, 0, 1),
        (1, 0, 1),
    ]
    assert [stats.distinct_adapters for stats in steps] == [1, 1, 1, 1]
    assert [ended.outcome for stats in steps for ended in stats.counters.ended] == ["length", "length"]
    assert sum(stats.counters.prefix_hit for stats in steps) == 8
    assert steps[0].load.kv_blocks_held == 3
    assert all(stats.times.run > 0 and stats.times.plan > 0 for stats in steps)


async def test_opening_and_cancelling_a_thousand_times_leaves_nothing_behind():
    async with running(limits(max_queued=2000)) as server:
        for number in range(1000):
            stream = server.client.submit(submission(f"r{number}", max_tokens=40, digest=digest(number % 9)))
            if number % 3:
                await asyncio.sleep(0)
            stream.abort()
        for _ in range(1000):
            if count_submissions(server.client) == 0:
                break
            await asyncio.sleep(0.01)
        assert count_choices(server.client) == 0
        await read(server.client.submit(submission("last", prompt=[60] * 3)))
    assert server.scheduler.is_idle
    assert (server.scheduler.tables.pool.held, server.pool.leased) == (0, 0)
    assert server.runner.known <= {"1001:last#0"}, "the runner was told of every end"

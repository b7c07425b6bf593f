"""The asyncio side: streams, refusals, aborts, and one terminal event per choice whatever happens."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict

import pytest

from loramux_server.engine.client import EngineClient
from loramux_server.engine.mailbox import Abort, Finish, Mailbox, Submit
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.stream import RequestStream
from loramux_server.errors import Draining, DuplicateRequest, InvalidRequest, Overloaded, Unavailable
from loramux_server.requests import FinishReason, RequestFailure, TokenEvent
from support.engine_client import count_choices, count_submissions
from support.engine_thread import running
from support.fake_runner import solo
from support.scheduler_harness import digest, limits, submission

pytestmark = pytest.mark.asyncio


async def read(stream: RequestStream) -> dict[int, list[TokenEvent]]:
    """All events by choice."""
    events: dict[int, list[TokenEvent]] = defaultdict(list)
    async for event in stream:
        events[event.choice].append(event)
    return events


def token(number: int = 1, choice: int = 0) -> TokenEvent:
    return TokenEvent(choice, token=number)


def end(choice: int = 0) -> TokenEvent:
    return TokenEvent(choice, finish=FinishReason.LENGTH)


class ClientHarness:
    """A client whose engine is the test."""

    def __init__(self, **changes: int) -> None:
        self.mailbox = Mailbox(100)
        self.now = 0.0
        self.client = EngineClient(self.mailbox, limits(**changes), clock=lambda: self.now)

    def take(self) -> list[object]:
        return list(self.mailbox.take(0.0))

    async def publish(self, *events: tuple[int, TokenEvent]) -> None:
        self.client.publish(events)
        await asyncio.sleep(0)


async def test_a_stream_gives_what_a_solo_run_gives():
    async with running() as server:
        what = submission(prompt=5, max_tokens=7, n=2, digest=digest(1))
        events = await asyncio.wait_for(read(server.client.submit(what)), 20)
    for choice in (0, 1):
        tokens, finish = solo(what, choice)
        assert [event.token for event in events[choice]] == tokens
        assert events[choice][-1].finish is finish
    assert count_choices(server.client) == 0
    assert server.pool.leased == 0


async def test_a_duplicate_id_is_refused_while_open_and_free_afterwards():
    async with running() as server:
        first = server.client.submit(submission("same", max_tokens=50))
        with pytest.raises(DuplicateRequest):
            server.client.submit(submission("same"))
        other = server.client.submit(submission("same", tenant="other"))
        await asyncio.wait_for(asyncio.gather(read(first), read(other)), 20)
        await asyncio.wait_for(read(server.client.submit(submission("same"))), 20)
    assert server.watch.rejections == ["DUPLICATE_REQUEST"]


async def test_what_is_too_much_is_refused_at_once_with_a_delay():
    harness = ClientHarness(max_running=2, max_batch_tokens=8, max_queued=1)
    harness.client.submit(submission("a", n=2))
    harness.client.submit(submission("b"))
    with pytest.raises(Overloaded) as caught:
        harness.client.submit(submission("c"))
    assert caught.value.retry_after == 1.0
    assert [type(command) for command in harness.take()] == [Submit, Submit]
    await harness.publish((1, end(0)))
    harness.client.submit(submission("c"))
    assert count_choices(harness.client) == 3


async def test_every_choice_of_a_submission_takes_a_place():
    harness = ClientHarness(max_running=2, max_batch_tokens=8, max_queued=1)
    harness.client.submit(submission("a", n=2))
    with pytest.raises(Overloaded):
        harness.client.submit(submission("b", n=2))
    assert count_choices(harness.client) == 2
    harness.client.submit(submission("b"))


async def test_the_retry_delay_follows_throughput_while_busy():
    harness = ClientHarness(max_queued=15)
    for number in range(1, 5):
        harness.client.submit(submission(f"r{number}"))
    for number in (1, 2, 3):
        harness.now += 0.5
        await harness.publish((number, end()))
    assert harness.client._estimate_retry() == pytest.approx(0.5 * 2)
    await harness.publish((4, end()))
    harness.now += 3600.0
    harness.client.submit(submission("late"))
    await harness.publish((5, end()))
    assert harness.client._estimate_retry() < 1.0, "an idle hour is no throughput"


async def test_what_can_never_fit_is_refused_before_the_engine_hears_of_it():
    harness = ClientHarness(kv_blocks=2)
    for bad in (submission(prompt=9), submission(prompt=[]), submission(n=0), submission(n=10**6)):
        with pytest.raises(InvalidRequest):
            harness.client.submit(bad)
    assert harness.take() == []


async def test_a_full_mailbox_is_overload():
    client = EngineClient(Mailbox(1), limits())
    client.submit(submission("a"))
    with pytest.raises(Overloaded):
        client.submit(submission("b"))
    assert count_choices(client) == 1


async def test_abort_by_id_reaches_the_engine_once_and_only_the_owner_may():
    harness = ClientHarness()
    harness.client.submit(submission("a"))
    assert not harness.client.abort("other", "a")
    assert not harness.client.abort("default", "b")
    assert harness.client.abort("default", "a")
    assert harness.client.abort("default", "a")
    assert harness.take()[1:] == [Abort(1)]
    await harness.publish((1, TokenEvent(0, finish=FinishReason.ABORTED)))
    assert not harness.client.abort("default", "a")


async def test_an_aborted_reader_hears_of_it():
    async with running() as server:
        aborted = threading.Event()

        def hold(plan: StepPlan) -> dict[str, RequestFailure]:
            if plan.step > 1:  # a fast engine would be through before the reader has seen the first token
                aborted.wait(20)
            return {}

        server.runner.inject = hold
        stream = server.client.submit(submission(max_tokens=200))
        async for event in stream:
            if event.token is not None:
                assert server.client.abort("default", "r")
                aborted.set()
                break
        rest = await asyncio.wait_for(read(stream), 20)
    assert rest[0][-1].finish is FinishReason.ABORTED


async def test_a_cancelled_reader_aborts_its_request():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a", n=2))
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert harness.take()[1:] == [Abort(1)]


async def test_leaving_the_block_early_aborts_and_leaving_it_at_the_end_does_not():
    harness = ClientHarness()
    async with harness.client.submit(submission("a")):
        await harness.publish((1, token()))
    assert harness.take()[1:] == [Abort(1)]
    async with harness.client.submit(submission("b")) as stream:
        await harness.publish((2, end()))
        assert len((await read(stream))[0]) == 1
    assert [type(command) for command in harness.take()] == [Submit]


async def test_a_finished_choice_is_retired_and_says_no_more():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a", n=2))
    await harness.publish((1, token(1, 0)), (1, token(2, 0)), (1, token(3, 1)))
    first = await anext(stream)
    assert first.token == 1
    stream.finish(0)
    stream.finish(0)
    assert harness.take()[1:] == [Finish(1, 0)]
    await harness.publish((1, token(4, 0)), (1, TokenEvent(0, finish=FinishReason.STOP)), (1, end(1)))
    assert [(event.choice, event.token) for event in (await read(stream))[1]] == [(1, 3), (1, None)]
    assert count_submissions(harness.client) == 0


async def test_an_id_is_free_when_its_reader_has_finished_although_the_engine_has_not():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a"))
    stream.finish(0)
    again = harness.client.submit(submission("a"))
    await harness.publish((1, end()), (2, token(9)), (2, end()))
    assert await read(stream) == {}
    assert [event.token for event in (await read(again))[0]] == [9, None]
    assert harness.client.submit(submission("a")).is_open


async def test_the_engine_cannot_end_a_choice_twice():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a", n=2))
    await harness.publish((1, end(0)), (1, end(0)), (1, token(1, 0)), (99, end()), (1, end(1)))
    assert {choice: len(events) for choice, events in (await read(stream)).items()} == {0: 1, 1: 1}
    assert count_choices(harness.client) == 0


async def test_ready_events_are_taken_together():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a"))
    await harness.publish((1, token(1)), (1, token(2)), (1, end()))
    assert (await anext(stream)).token == 1
    assert [event.token for event in stream.take_ready()] == [2, None]
    assert await read(stream) == {}


async def test_a_stream_has_one_reader():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a"))
    first = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await anext(stream)
    await harness.publish((1, end()))
    assert len((await first)[0]) == 1


async def test_draining_refuses_the_new_and_keeps_the_old():
    async with running() as server:
        stream = server.client.submit(submission(max_tokens=20))
        server.client.drain()
        with pytest.raises(Draining):
            server.client.submit(submission("b"))
        events = await asyncio.wait_for(read(stream), 20)
    assert len(events[0]) == 20
    with pytest.raises(Draining):
        server.client.submit(submission("c"))


async def test_what_an_engine_cuts_off_is_counted_and_what_was_aborted_is_not():
    harness = ClientHarness()
    streams = [harness.client.submit(submission(name, n=2 if name == "a" else 1)) for name in "abcde"]
    harness.client.drain()
    assert harness.client.running_requests == 5
    aborted = TokenEvent(0, finish=FinishReason.ABORTED)
    await harness.publish((1, end(0)), (2, end()))
    assert (harness.client.running_requests, harness.client.cut_off_requests) == (4, 0)
    streams[2].abort()
    await harness.publish((1, TokenEvent(1, finish=FinishReason.ABORTED)), (3, aborted))
    assert (harness.client.running_requests, harness.client.cut_off_requests) == (2, 1)
    streams[3].abort()
    harness.client.fail_all(RequestFailure("DRAINING", "the server has stopped"))
    assert (harness.client.running_requests, harness.client.cut_off_requests) == (0, 2)


async def test_fail_all_ends_each_choice_once_and_refuses_from_then_on():
    harness = ClientHarness()
    stream = harness.client.submit(submission("a", n=3))
    await harness.publish((1, end(0)))
    stream.finish(1)
    harness.client.fail_all(RequestFailure("ENGINE_DEAD", "a step hangs"))
    await harness.publish((1, end(2)))
    events = await read(stream)
    assert [event.failure and event.failure.code for event in events[2]] == ["ENGINE_DEAD"]
    assert [event.failure for event in events[0]] == [None]
    assert 1 not in events
    with pytest.raises(Unavailable, match="a step hangs"):
        harness.client.submit(submission("b"))


@pytest.mark.parametrize("seed", range(4))
async def test_every_choice_ends_once_under_random_traffic(seed: int):
    """A crowd on a tiny server with readers that leave, abort, stop by string and stall."""
    random_ = random.Random(seed)
    bounds = limits(kv_blocks=20, max_running=4, max_queued=60, max_batch_tokens=24)

    async with running(bounds) as server:

        async def talk(number: int) -> None:
            what = submission(
                f"r{number}",
                prompt=[number % 3] * random_.randint(1, 12),
                max_tokens=random_.randint(0, 14),
                n=random_.randint(1, 3),
                digest=digest(number % 6) if number % 3 else None,
            )
            try:
                stream = server.client.submit(what)
            except Overloaded:
                return
            manner = random_.choice(["read", "read", "abort", "stop", "cancel"])
            ended: list[int] = []
            tokens: dict[int, list[int]] = defaultdict(list)
            async with stream:
                async for event in stream:
                    if event.token is not None:
                        tokens[event.choice].append(event.token)
                        if manner == "stop" and len(tokens[event.choice]) == 2 and not event.terminal:
                            stream.finish(event.choice)
                            ended.append(event.choice)
                        if manner == "abort":
                            server.client.abort("default", what.request_id)
                        if manner == "cancel":
                            return
                    if event.terminal:
                        ended.append(event.choice)
                    if random_.random() < 0.2:
                        await asyncio.sleep(0.001)
            assert sorted(ended) == list(range(what.n))
            for choice in range(what.n):
                alone, _ = solo(what, choice)
                assert tokens[choice] == alone[: len(tokens[choice])]
                if manner == "read":
                    assert tokens[choice] == alone

        await asyncio.wait_for(asyncio.gather(*(talk(number) for number in range(60))), 60)
        for _ in range(400):
            if count_choices(server.client) == 0:
                break
            await asyncio.sleep(0.01)
        assert count_choices(server.client) == 0
    assert server.deaths == []
    assert server.scheduler.tables.pool.held == 0
    assert server.pool.leased == 0
    server.scheduler.tables.pool.check()

"""Order of service and bounded overtaking."""

from __future__ import annotations

import pytest

from loramux_server.engine.policies import LOADS_AHEAD, AdapterAdmission, FirstComeFirstServed
from loramux_server.engine.request import Request, expand
from support.fake_pool import FakePool
from support.scheduler_harness import SchedulerHarness, digest, limits, submission


def request(ticket: int, **more: object) -> Request:
    (one,) = expand(ticket, submission(f"r{ticket}", **more), 0.0)
    return one


def test_priority_then_arrival_then_choice():
    policy = FirstComeFirstServed()
    for one in (request(3), request(1), request(2, priority=-1), *expand(4, submission(n=2, priority=-1), 0.0)):
        policy.add(one)
    assert [(one.ticket, one.choice) for one in policy] == [(2, 0), (4, 0), (4, 1), (1, 0), (3, 0)]
    assert len(policy) == 5


def test_removal_takes_the_one_and_misses_are_errors():
    policy = FirstComeFirstServed()
    first, second = request(1), request(2)
    policy.add(first)
    policy.add(second)
    policy.remove(first)
    assert list(policy) == [second]
    with pytest.raises(ValueError, match="not in the list"):
        policy.remove(first)


def test_the_victim_is_last_in_order():
    old, new, low = request(1), request(2), request(3, priority=1)
    assert FirstComeFirstServed().find_victim([new, low, old]) is low
    assert FirstComeFirstServed().find_victim([new, old]) is new


def test_one_pass_asks_once_per_adapter():
    turns = AdapterAdmission(bound=2, tries=8)
    first, same, other = (request(number, digest=digest(kind)) for number, kind in ((1, 1), (2, 1), (3, 2)))
    assert turns.may_ask(first)
    turns.skip(first)
    assert not turns.may_ask(same)
    assert turns.may_ask(other)


def test_a_pass_ends_when_enough_adapters_were_asked_for():
    turns = AdapterAdmission(bound=9, tries=2)
    for number in (1, 2):
        assert not turns.is_over
        turns.skip(request(number, digest=digest(number)))
    assert turns.is_over


def test_after_the_bound_nobody_else_may_ask():
    waiting = request(1, digest=digest(1))
    for skipped in range(2):
        turns = AdapterAdmission(bound=2, tries=8)
        turns.skip(waiting)
        other = request(2, digest=digest(2))
        assert turns.may_ask(other)
        turns.admit(other)
        assert waiting.skips == skipped + 1
    turns = AdapterAdmission(bound=2, tries=8)
    turns.skip(waiting)
    assert not turns.may_ask(request(3, digest=digest(3)))
    AdapterAdmission(bound=2, tries=8).admit(waiting)
    assert waiting.skips == 0


def test_the_bound_holds_within_one_pass():
    turns = AdapterAdmission(bound=1, tries=8)
    turns.skip(request(1, digest=digest(1)))
    turns.admit(request(2, digest=digest(2)))
    assert not turns.may_ask(request(3, digest=digest(3)))


def test_a_stream_of_lucky_adapters_cannot_starve_an_unlucky_one():
    """Two slots, two popular adapters with new requests before each step: the third gets its slot all the same."""
    pool = FakePool(2)
    harness = SchedulerHarness(limits(max_skips=3, max_running=4), pool)
    for number in (1, 2):
        harness.submit(submission(f"warm{number}", digest=digest(number), max_tokens=1))
    harness.step()
    pool.report_all()
    harness.step()
    unlucky = None
    passed = 0
    for turn in range(60):
        harness.submit(submission(f"lucky{turn}", prompt=[turn % 60] * 3, digest=digest(1 + turn % 2), max_tokens=4))
        if turn == 4:
            unlucky = harness.submit(submission("unlucky", digest=digest(3)))
        plan = harness.step()
        pool.report_all()
        if unlucky is not None:
            if harness.tokens(unlucky):
                break
            passed += sum(chunk.start == 0 and int(chunk.request_id.split(":")[0]) > unlucky for chunk in plan.chunks)
    assert unlucky is not None
    assert harness.tokens(unlucky), "it starved"
    assert passed <= 3
    harness.run()
    harness.check_idle()


def test_requests_for_the_base_pass_also_when_a_turn_is_taken():
    harness = SchedulerHarness(limits(max_skips=0), FakePool(2))
    harness.submit(submission("waits", digest=digest(1)))
    harness.submit(submission("barred", digest=digest(2)))
    base = harness.submit(submission("base", prompt=[5] * 3))
    harness.step()
    assert harness.pool.asked == [digest(1)]
    assert len(harness.tokens(base)) == 1
    harness.run()
    harness.check_idle()


def test_many_adapters_through_few_slots_all_end():
    harness = SchedulerHarness(limits(max_skips=2), FakePool(3))
    tickets = [
        harness.submit(submission(f"r{number}", prompt=[number % 60] * 4, digest=digest(number % 17)))
        for number in range(68)
    ]
    harness.run()
    for ticket in tickets:
        harness.check_equal_to_solo(ticket)
    harness.check_idle()


def test_a_pass_loads_for_the_places_there_are_and_a_few_ahead():
    turns = AdapterAdmission(bound=99, tries=32)
    for number in range(2 + LOADS_AHEAD):
        assert turns.may_load(places=2)
        turns.skip(request(number, digest=digest(number)))
    assert not turns.may_load(places=2)
    assert turns.may_load(places=3)
    assert turns.may_ask(request(99, digest=digest(99)))


def test_what_is_on_the_device_passes_those_that_may_not_load():
    pool = FakePool(12)
    harness = SchedulerHarness(limits(max_running=2), pool)
    harness.submit(submission("first", digest=digest(50), max_tokens=3))
    harness.step()
    pool.report_all()
    harness.step()
    harness.submit(submission("long", max_tokens=9))  # leaves one place
    for number in range(10):
        harness.submit(submission(f"new{number}", digest=digest(number)))
    last = harness.submit(submission("resident", digest=digest(50)))
    for _ in range(4):
        harness.step()
    assert pool.loading == [digest(number) for number in range(1 + LOADS_AHEAD)]
    assert harness.tokens(last)

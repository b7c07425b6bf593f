"""Preemption by recompute: who gives way, what comes back, and that nothing is sampled twice."""

from __future__ import annotations

from support.fake_pool import FakePool
from support.scheduler_harness import SchedulerHarness, digest, limits, submission


def run_until_preempted(harness: SchedulerHarness) -> None:
    for _ in range(100):
        preempted = harness.scheduler._counters.preemptions
        harness.step()
        if harness.scheduler._counters.preemptions > preempted:
            return
    raise AssertionError("nobody was preempted")


def test_the_newest_gives_way_and_all_equal_their_solo_runs():
    harness = SchedulerHarness(limits(kv_blocks=12, prefix_cache=False))
    tickets = [harness.submit(submission(name, prompt=[ord(name)] * 9, max_tokens=12)) for name in "abc"]
    run_until_preempted(harness)
    assert [chunk.request_id for chunk in harness.runner.plans[-1].chunks] == ["1:a#0", "2:b#0"]
    harness.run()
    for ticket in tickets:
        harness.check_equal_to_solo(ticket)
    ended = harness.scheduler.take_counters().ended
    assert [one.preemptions for one in sorted(ended, key=lambda one: one.preemptions)][-1] >= 1
    harness.check_idle()


def test_the_lowest_priority_gives_way_even_if_it_is_oldest():
    harness = SchedulerHarness(limits(kv_blocks=9, prefix_cache=False))
    harness.submit(submission("old", prompt=[1] * 9, max_tokens=12, priority=9))
    harness.submit(submission("new", prompt=[2] * 9, max_tokens=12))
    run_until_preempted(harness)
    assert [chunk.request_id for chunk in harness.runner.plans[-1].chunks] == ["2:new#0"]
    harness.run()
    harness.check_idle()


def test_output_is_part_of_the_recompute_and_its_last_token_samples():
    harness = SchedulerHarness(limits(kv_blocks=9, prefix_cache=False))
    harness.submit(submission("a", prompt=[1] * 11, max_tokens=14, sampling={"presence_penalty": 1.0}))
    back = harness.submit(submission("b", prompt=[2] * 11, max_tokens=14, sampling={"presence_penalty": 1.0}))
    run_until_preempted(harness)
    had = harness.tokens(back)
    assert had
    for _ in range(40):
        chunks = [chunk for chunk in harness.step().chunks if chunk.request_id == "2:b#0"]
        if chunks:
            break
    assert (chunks[0].start, chunks[0].tokens, chunks[0].samples) == (0, (2,) * 11 + tuple(had), True)
    assert chunks[0].history == ()
    assert chunks[0].prompt_length == 11
    harness.run()
    harness.check_equal_to_solo(back)
    harness.check_idle()


def test_a_preempted_request_gives_its_lease_back_and_takes_one_again():
    pool = FakePool(2, at_once=True)
    harness = SchedulerHarness(limits(kv_blocks=9), pool)
    harness.submit(submission("a", prompt=[1] * 11, max_tokens=14, digest=digest(1)))
    ticket = harness.submit(submission("b", prompt=[2] * 11, max_tokens=14, digest=digest(2)))
    run_until_preempted(harness)
    assert pool.leases == {digest(1): 1, digest(2): 0}
    harness.run()
    assert pool.asked.count(digest(2)) == 2
    harness.check_equal_to_solo(ticket)
    harness.check_idle()


def test_a_preempted_request_finds_its_own_blocks_again():
    harness = SchedulerHarness(limits(kv_blocks=9))
    harness.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    ticket = harness.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    run_until_preempted(harness)
    harness.run()
    harness.check_equal_to_solo(ticket)
    starts = [chunk.start for plan in harness.runner.plans for chunk in plan.chunks if chunk.request_id == "2:b#0"]
    assert starts.count(0) == 1
    assert starts.count(12) == 2, "three of its four blocks were still there"
    usage = harness.last(ticket).usage
    assert usage is not None
    assert usage.cached == 0, "one's own blocks are no cache hit of the prompt"


def test_nobody_is_admitted_in_the_step_that_preempts():
    harness = SchedulerHarness(limits(kv_blocks=9, prefix_cache=False))
    harness.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    harness.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    harness.step()
    harness.submit(submission("c", prompt=[3] * 3, max_tokens=2, priority=-1, digest=digest(1)))
    harness.pool.slots = []
    run_until_preempted(harness)
    assert harness.scheduler.load().waiting == {"blocks": 2}


def test_admission_leaves_a_block_for_each_that_runs():
    harness = SchedulerHarness(limits(kv_blocks=6))
    harness.submit(submission("a", prompt=[1] * 8, max_tokens=5))
    harness.step()
    harness.submit(submission("b", prompt=[2] * 16, max_tokens=2))
    harness.step()
    assert harness.scheduler.load().waiting == {"blocks": 1}
    harness.run()
    harness.check_idle()


def test_a_large_request_is_not_passed_for_blocks():
    harness = SchedulerHarness(limits(kv_blocks=10))
    harness.submit(submission("a", prompt=[1] * 16, max_tokens=8))
    harness.step()
    harness.submit(submission("large", prompt=[2] * 30, max_tokens=2))
    harness.submit(submission("small", prompt=[3] * 3, max_tokens=2))
    order = [chunk.request_id for plan in harness.run() for chunk in plan.chunks]
    assert order.index("2:large#0") < order.index("3:small#0")


def test_prompt_logprobs_start_anew_when_the_prompt_is_preempted():
    harness = SchedulerHarness(limits(kv_blocks=12, max_batch_tokens=10, max_running=4, prefix_cache=False))
    harness.submit(submission("a", prompt=[1] * 3, max_tokens=40, priority=-1))
    harness.step()
    ticket = harness.submit(submission("b", prompt=[2] * 30, max_tokens=2, sampling={"prompt_logprobs": 0}))
    harness.step()
    victim = harness.scheduler._live["2:b#0"]
    assert 0 < victim.computed < 30
    harness.scheduler._preempt(victim)
    harness.run()
    told = [event.prompt_logprobs for event in harness.events[ticket, 0] if event.prompt_logprobs is not None]
    assert [len(entry) for entry in told] == [30]
    harness.check_equal_to_solo(ticket)

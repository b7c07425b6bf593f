"""Preemption by recompute: who gives way, what comes back, and that nothing is sampled twice."""

from __future__ import annotations

from support.engine_drive import Drive, digest, limits, submission
from support.fake_pool import FakePool


def drive_until_preempted(drive: Drive) -> None:
    for _ in range(100):
        preempted = drive.scheduler._counters.preemptions
        drive.step()
        if drive.scheduler._counters.preemptions > preempted:
            return
    raise AssertionError("nobody was preempted")


def test_the_newest_gives_way_and_all_equal_their_solo_runs():
    drive = Drive(limits(kv_blocks=12, prefix_cache=False))
    tickets = [drive.submit(submission(name, prompt=[ord(name)] * 9, max_tokens=12)) for name in "abc"]
    drive_until_preempted(drive)
    assert [chunk.request_id for chunk in drive.runner.plans[-1].chunks] == ["1:a#0", "2:b#0"]
    drive.run()
    for ticket in tickets:
        drive.check_equal_to_solo(ticket)
    ended = drive.scheduler.take_counters().ended
    assert [one.preemptions for one in sorted(ended, key=lambda one: one.preemptions)][-1] >= 1
    drive.check_idle()


def test_the_lowest_priority_gives_way_even_if_it_is_oldest():
    drive = Drive(limits(kv_blocks=9, prefix_cache=False))
    drive.submit(submission("old", prompt=[1] * 9, max_tokens=12, priority=9))
    drive.submit(submission("new", prompt=[2] * 9, max_tokens=12))
    drive_until_preempted(drive)
    assert [chunk.request_id for chunk in drive.runner.plans[-1].chunks] == ["2:new#0"]
    drive.run()
    drive.check_idle()


def test_output_is_part_of_the_recompute_and_its_last_token_samples():
    drive = Drive(limits(kv_blocks=9, prefix_cache=False))
    drive.submit(submission("a", prompt=[1] * 11, max_tokens=14, sampling={"presence_penalty": 1.0}))
    back = drive.submit(submission("b", prompt=[2] * 11, max_tokens=14, sampling={"presence_penalty": 1.0}))
    drive_until_preempted(drive)
    had = drive.tokens(back)
    assert had
    for _ in range(40):
        chunks = [chunk for chunk in drive.step().chunks if chunk.request_id == "2:b#0"]
        if chunks:
            break
    assert (chunks[0].start, chunks[0].tokens, chunks[0].samples) == (0, (2,) * 11 + tuple(had), True)
    assert chunks[0].history == ()
    assert chunks[0].prompt_length == 11
    drive.run()
    drive.check_equal_to_solo(back)
    drive.check_idle()


def test_a_preempted_request_gives_its_lease_back_and_takes_one_again():
    pool = FakePool(2, at_once=True)
    drive = Drive(limits(kv_blocks=9), pool)
    drive.submit(submission("a", prompt=[1] * 11, max_tokens=14, digest=digest(1)))
    ticket = drive.submit(submission("b", prompt=[2] * 11, max_tokens=14, digest=digest(2)))
    drive_until_preempted(drive)
    assert pool.leases == {digest(1): 1, digest(2): 0}
    drive.run()
    assert pool.asked.count(digest(2)) == 2
    drive.check_equal_to_solo(ticket)
    drive.check_idle()


def test_a_preempted_request_finds_its_own_blocks_again():
    drive = Drive(limits(kv_blocks=9))
    drive.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    ticket = drive.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    drive_until_preempted(drive)
    drive.run()
    drive.check_equal_to_solo(ticket)
    starts = [chunk.start for plan in drive.runner.plans for chunk in plan.chunks if chunk.request_id == "2:b#0"]
    assert starts.count(0) == 1
    assert starts.count(12) == 2, "three of its four blocks were still there"
    usage = drive.last(ticket).usage
    assert usage is not None
    assert usage.cached == 0, "one's own blocks are no cache hit of the prompt"


def test_nobody_is_admitted_in_the_step_that_preempts():
    drive = Drive(limits(kv_blocks=9, prefix_cache=False))
    drive.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    drive.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    drive.step()
    drive.submit(submission("c", prompt=[3] * 3, max_tokens=2, priority=-1, digest=digest(1)))
    drive.pool.slots = []
    drive_until_preempted(drive)
    assert drive.scheduler.load().waiting == {"blocks": 2}


def test_admission_leaves_a_block_for_each_that_runs():
    drive = Drive(limits(kv_blocks=6))
    drive.submit(submission("a", prompt=[1] * 8, max_tokens=5))
    drive.step()
    drive.submit(submission("b", prompt=[2] * 16, max_tokens=2))
    drive.step()
    assert drive.scheduler.load().waiting == {"blocks": 1}
    drive.run()
    drive.check_idle()


def test_a_large_request_is_not_passed_for_blocks():
    drive = Drive(limits(kv_blocks=10))
    drive.submit(submission("a", prompt=[1] * 16, max_tokens=8))
    drive.step()
    drive.submit(submission("large", prompt=[2] * 30, max_tokens=2))
    drive.submit(submission("small", prompt=[3] * 3, max_tokens=2))
    order = [chunk.request_id for plan in drive.run() for chunk in plan.chunks]
    assert order.index("2:large#0") < order.index("3:small#0")


def test_prompt_logprobs_start_anew_when_the_prompt_is_preempted():
    drive = Drive(limits(kv_blocks=12, max_batch_tokens=10, max_running=4, prefix_cache=False))
    drive.submit(submission("a", prompt=[1] * 3, max_tokens=40, priority=-1))
    drive.step()
    ticket = drive.submit(submission("b", prompt=[2] * 30, max_tokens=2, sampling={"prompt_logprobs": 0}))
    drive.step()
    victim = drive.scheduler._live["2:b#0"]
    assert 0 < victim.computed < 30
    drive.scheduler._preempt(victim)
    drive.run()
    told = [event.prompt_logprobs for event in drive.events[ticket, 0] if event.prompt_logprobs is not None]
    assert [len(entry) for entry in told] == [30]
    drive.check_equal_to_solo(ticket)

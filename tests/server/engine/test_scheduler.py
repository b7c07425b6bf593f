"""The scheduler's rules one by one: batching, chunks, ends, cache, choices, failures, merged weights."""

from __future__ import annotations

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterError, PoolExhausted
from loramux_server.engine.plan import BASE_SLOT, StepPlan
from loramux_server.requests import FinishReason, RequestFailure
from support.fake_pool import FakePool
from support.fake_runner import solo
from support.scheduler_harness import SchedulerHarness, digest, limits, submission


def shapes(plan: StepPlan) -> list[tuple[int, int]]:
    """(start, tokens) of each chunk."""
    return [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks]


def test_a_request_runs_to_its_limit_and_equals_its_solo_run():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5, max_tokens=4))
    plans = harness.run()
    assert [shapes(plan) for plan in plans] == [[(0, 5)], [(5, 1)], [(6, 1)], [(7, 1)]]
    assert [plan.step for plan in plans] == [1, 2, 3, 4]
    harness.check_equal_to_solo(ticket)
    end = harness.last(ticket)
    assert (end.finish, end.usage and end.usage.completion, end.usage and end.usage.prompt) == (
        FinishReason.LENGTH,
        4,
        5,
    )
    harness.check_idle()


def test_every_token_event_counts_usage_so_far():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=3, max_tokens=3))
    harness.run()
    assert [event.usage.completion for event in harness.events[ticket, 0] if event.usage] == [1, 2, 3]


def test_max_tokens_zero_computes_the_prompt_and_samples_nothing():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=40, max_tokens=0))
    plans = harness.run()
    assert not any(chunk.samples for plan in plans for chunk in plan.chunks)
    assert [event.finish for event in harness.events[ticket, 0]] == [FinishReason.LENGTH]
    harness.check_idle()


def test_decodes_come_first_and_prefill_chunks_fill_the_budget():
    harness = SchedulerHarness(limits(max_batch_tokens=10))
    harness.submit(submission("a", prompt=4, max_tokens=9))
    harness.step()
    long = harness.submit(submission("b", prompt=[7] * 25, max_tokens=2))
    plans = [harness.step() for _ in range(4)]
    assert [shapes(plan) for plan in plans] == [
        [(4, 1), (0, 9)],
        [(5, 1), (9, 9)],
        [(6, 1), (18, 7)],
        [(7, 1), (25, 1)],
    ]
    assert [chunk.samples for chunk in plans[2].chunks] == [True, True]
    harness.check_equal_to_solo(long)


def test_several_requests_share_a_step_and_an_older_prefill_goes_first():
    harness = SchedulerHarness(limits(max_batch_tokens=20))
    for name, prompt in (("a", 12), ("b", 12), ("c", 3)):
        harness.submit(submission(name, prompt=[ord(name)] * prompt))
    assert shapes(harness.step()) == [(0, 12), (0, 8)]
    assert shapes(harness.step()) == [(12, 1), (8, 4), (0, 3)]
    harness.run()
    harness.check_idle()


def test_no_more_run_than_allowed_and_the_rest_waits_for_capacity():
    harness = SchedulerHarness(limits(max_running=2))
    for name in "abcd":
        harness.submit(submission(name, prompt=[ord(name)] * 3, max_tokens=2))
    assert len(harness.step().chunks) == 2
    assert harness.scheduler.load().waiting == {"capacity": 2}
    harness.run()
    harness.check_idle()


def test_a_newcomer_leaves_those_that_run_a_block_each():
    """Admitted into the last blocks it would be sent back at once: 14 preemptions here, not 1."""
    harness = SchedulerHarness(limits(kv_blocks=12, prefix_cache=False, max_batch_tokens=64))
    tickets = [harness.submit(submission(f"r{index}", prompt=[index] * 11, max_tokens=12)) for index in range(16)]
    harness.run()
    assert harness.scheduler.take_counters().preemptions <= 4
    for ticket in tickets:
        harness.check_equal_to_solo(ticket)


def test_a_better_priority_is_admitted_first():
    harness = SchedulerHarness(limits(max_running=1))
    harness.submit(submission("late", prompt=3, priority=5))
    harness.submit(submission("soon", prompt=3, priority=-1))
    assert "soon" in harness.step().chunks[0].request_id


def test_a_stop_token_ends_with_the_token_in_the_event():
    what = submission(prompt=5, max_tokens=8)
    third = solo(what)[0][2]
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5, max_tokens=8, stop={"stop_token_ids": frozenset({third})}))
    harness.run()
    end = harness.last(ticket)
    assert (end.finish, end.token, end.stop_token) == (FinishReason.STOP, third, third)
    harness.check_equal_to_solo(ticket)


@pytest.mark.parametrize(("ignored", "finish"), [(False, FinishReason.STOP), (True, FinishReason.LENGTH)])
def test_eos_ends_unless_ignored(ignored: bool, finish: FinishReason):
    first = solo(submission(prompt=5))[0][0]
    stop = {"eos_token_ids": frozenset({first}), "ignore_eos": ignored}
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5, stop=stop))
    harness.run()
    assert harness.last(ticket).finish is finish
    harness.check_equal_to_solo(ticket)


def test_a_stop_token_before_min_tokens_does_not_end():
    tokens = solo(submission(prompt=5, max_tokens=6))[0]
    stop = {"stop_token_ids": frozenset({tokens[1]}), "min_tokens": 2}
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5, max_tokens=6, stop=stop))
    harness.run()
    assert len(harness.tokens(ticket)) > 2
    harness.check_equal_to_solo(ticket)


def test_choices_differ_share_the_prompt_and_end_each_once():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=9, n=3, max_tokens=3, sampling={"prompt_logprobs": 0}))
    assert shapes(harness.step()) == [(0, 9)]
    assert harness.scheduler.load().waiting == {"sibling": 2}
    assert shapes(harness.step()) == [(9, 1), (8, 1), (8, 1)]
    harness.run()
    harness.check_equal_to_solo(ticket)
    assert len({tuple(harness.tokens(ticket, choice)) for choice in range(3)}) == 3
    assert [harness.events[ticket, choice][0].prompt_logprobs is None for choice in range(3)] == [False, True, True]
    harness.check_idle()


def test_choices_go_on_when_the_first_is_ended_before_its_prompt_is_done():
    harness = SchedulerHarness(limits(max_batch_tokens=8))
    ticket = harness.submit(submission(prompt=20, n=2))
    harness.step()
    harness.finish(ticket, 0)
    harness.run()
    assert harness.tokens(ticket, 1) == solo(harness.submitted[ticket], 1)[0]
    harness.check_idle()


def test_retired_ids_are_told_once_and_only_of_requests_the_runner_saw():
    harness = SchedulerHarness(limits(max_running=1))
    first = harness.submit(submission("a", prompt=3, max_tokens=1))
    waiting = harness.submit(submission("b", prompt=3))
    harness.step()
    harness.abort(waiting)
    harness.submit(submission("c", prompt=3, max_tokens=2))
    plans = harness.run()
    retired = [key for plan in harness.runner.plans for key in plan.retired]
    assert retired == [plans[0].retired[0]] == ["1:a#0"]
    assert harness.last(first).finish is FinishReason.LENGTH


def test_an_aborted_request_is_gone_before_the_next_step():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5, max_tokens=50, digest=digest(1), n=2))
    other = harness.submit(submission("o", prompt=5))
    harness.step()
    harness.step()
    harness.abort(ticket)
    harness.abort(ticket)
    assert [harness.last(ticket, choice).finish for choice in (0, 1)] == [FinishReason.ABORTED] * 2
    assert harness.pool.leased == 0
    harness.run()
    harness.check_equal_to_solo(other)
    harness.check_idle()


def test_a_deadline_frees_blocks_and_lease_within_one_step():
    harness = SchedulerHarness(limits(max_batch_tokens=8))
    ticket = harness.submit(submission(prompt=40, digest=digest(1), deadline=2.5))
    harness.step()
    harness.step()
    assert harness.pool.leased == 1
    assert harness.step().chunks == ()
    failure = harness.last(ticket).failure
    assert failure is not None
    assert failure.code == "DEADLINE"
    harness.check_idle()


def test_a_waiting_request_meets_its_deadline_too_and_others_keep_theirs():
    harness = SchedulerHarness(limits(max_running=1))
    harness.submit(submission("a", prompt=3, max_tokens=9, deadline=100.0))
    waiting = harness.submit(submission("b", prompt=3, deadline=1.5))
    harness.step()
    assert harness.scheduler.next_deadline == 1.5
    harness.step()
    failure = harness.last(waiting).failure
    assert failure is not None
    assert failure.code == "DEADLINE"
    assert harness.scheduler.next_deadline == 100.0
    harness.run()
    harness.check_idle()


def test_what_can_never_fit_fails_at_once():
    harness = SchedulerHarness(limits(kv_blocks=4))
    ticket = harness.submit(submission(prompt=10, max_tokens=8))
    failure = harness.last(ticket).failure
    assert failure is not None
    assert failure.code == "TOO_LARGE"
    fits = harness.submit(submission(prompt=10, max_tokens=7))
    harness.run()
    harness.check_equal_to_solo(fits)


def test_a_request_that_fails_in_a_step_hurts_nobody_and_leaves_no_prefix():
    harness = SchedulerHarness()
    bad = harness.submit(submission("bad", prompt=8))
    good = harness.submit(submission("good", prompt=[9] * 8))
    harness.runner.inject = lambda plan: {"1:bad#0": RequestFailure("NUMERIC", "logits are not finite")}
    harness.step()
    harness.runner.inject = None
    harness.run()
    failure = harness.last(bad).failure
    assert failure is not None
    assert failure.code == "NUMERIC"
    harness.check_equal_to_solo(good)
    harness.submit(submission("again", prompt=8))
    assert shapes(harness.step()) == [(0, 8)]


def test_a_step_that_forgets_a_request_fails_it():
    harness = SchedulerHarness()
    ticket = harness.submit(submission(prompt=5))
    plan = harness.scheduler.plan(1.0)
    harness.scheduler.commit(plan, type(harness.runner.execute(plan))(plan.step, {}), 1.0)
    ((_, event),) = harness.scheduler.take_events()
    assert event.failure is not None
    assert event.failure.code == "INTERNAL"
    assert harness.scheduler.is_idle
    assert ticket == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterCorrupt("bytes differ"), "ADAPTER_CORRUPT"),
        (PoolExhausted("too large"), "ADAPTER_TOO_LARGE"),
        (AdapterError("no"), "ADAPTER_LOAD_FAILED"),
    ],
)
def test_a_failed_load_fails_the_one_request(error: AdapterError, code: str):
    harness = SchedulerHarness(pool=FakePool(2))
    bad = harness.submit(submission("a", digest=digest(1)))
    good = harness.submit(submission("b", digest=digest(2)))
    harness.step()
    harness.pool.report(digest(1), error)
    harness.run()
    failure = harness.last(bad).failure
    assert failure is not None
    assert failure.code == code
    harness.check_equal_to_solo(good)
    harness.check_idle()


def test_others_pass_a_request_whose_adapter_is_loading():
    harness = SchedulerHarness(pool=FakePool(2))
    slow = harness.submit(submission("a", digest=digest(1), prompt=[1] * 5))
    base = harness.submit(submission("b", prompt=[2] * 5))
    assert [chunk.request_id for chunk in harness.step().chunks] == ["2:b#0"]
    assert harness.scheduler.load().waiting == {"adapter": 1}
    harness.run()
    harness.check_equal_to_solo(slow)
    harness.check_equal_to_solo(base)


def test_rows_carry_their_slot_and_leases_end_with_requests():
    harness = SchedulerHarness(pool=FakePool(3, at_once=True))
    harness.submit(submission("a", digest=digest(1), max_tokens=1))
    harness.submit(submission("b", digest=digest(2), max_tokens=2))
    harness.submit(submission("c", max_tokens=2))
    assert [chunk.slot for chunk in harness.step().chunks] == [0, 1, BASE_SLOT]
    assert harness.pool.leases == {digest(1): 0, digest(2): 1}
    harness.run()
    harness.check_idle()


def test_as_many_merged_rows_as_are_worth_it_are_merged_beside_others():
    """The most rows of one adapter, and no adapter's but its own."""
    harness = SchedulerHarness(
        limits(max_batch_tokens=64, merged_rows=4), ready=lambda: frozenset({digest(1), digest(2)})
    )
    harness.submit(submission("a", prompt=5, digest=digest(1), max_tokens=2))
    harness.submit(submission("b", prompt=9, digest=digest(2), max_tokens=2))
    harness.submit(submission("c", prompt=19, max_tokens=2))
    plan = harness.step()
    assert plan.merged == digest(2)
    assert [chunk.is_merged for chunk in plan.chunks] == [False, True, False]
    plan = harness.step()  # one row each
    assert plan.merged is None
    assert not any(chunk.is_merged for chunk in plan.chunks)
    harness.run()
    harness.check_idle()


def test_a_merged_serves_steps_of_its_adapter_alone():
    ready: set[str] = set()
    harness = SchedulerHarness(ready=lambda: frozenset(ready))
    harness.submit(submission("a", digest=digest(1), max_tokens=20))
    assert harness.step().merged is None
    ready.add(digest(1))
    assert harness.step().merged == digest(1)
    other = harness.submit(submission("b", digest=digest(2), max_tokens=1))
    assert harness.step().merged is None
    harness.check_equal_to_solo(other)
    assert harness.step().merged == digest(1)
    harness.submit(submission("c", max_tokens=1))
    assert harness.step().merged is None
    harness.run()
    harness.check_idle()


def test_history_comes_with_the_first_chunk_of_requests_that_need_it():
    harness = SchedulerHarness()
    harness.submit(submission("a", prompt=9))
    harness.run()
    harness.submit(submission("b", prompt=9, sampling={"presence_penalty": 1.0}))
    plans = harness.run()
    assert [chunk.history for plan in plans for chunk in plan.chunks] == [tuple(range(8)), None, None, None]


def test_marks_and_load_tell_what_happened():
    harness = SchedulerHarness()
    harness.submit(submission("a", prompt=8, max_tokens=3, digest=digest(1)))
    harness.step()
    load = harness.scheduler.load()
    assert (load.running, load.running_adapters, load.kv_blocks_held) == (1, frozenset({digest(1)}), 2)
    harness.run()
    harness.submit(submission("b", prompt=8, max_tokens=1, digest=digest(1)))
    harness.run()
    marks = harness.scheduler.take_counters()
    assert (marks.queued, marks.first_token, marks.inter_token) == ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    assert (marks.prefix_queried, marks.prefix_hit, marks.preemptions) == (16, 4, 0)
    assert [(ended.outcome, ended.seconds, ended.completion) for ended in marks.ended] == [
        ("length", 3.0, 3),
        ("length", 1.0, 1),
    ]
    assert harness.scheduler.take_counters().ended == []


def test_adapters_of_waiting_requests_are_read_ahead_while_the_batch_is_full():
    harness = SchedulerHarness(limits(max_running=1))
    harness.submit(submission("running", max_tokens=8))
    harness.step()
    for number in (2, 1, 2):
        harness.submit(submission(f"waiting-{number}-{harness.now}-{len(harness.submitted)}", digest=digest(number)))
    asked = len(harness.pool.asked)
    harness.step()
    assert harness.pool.prefetched == [digest(2), digest(1)]
    assert len(harness.pool.asked) == asked  # no slot is taken for them
    harness.run()

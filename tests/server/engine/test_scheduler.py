"""The scheduler's rules one by one: batching, chunks, ends, cache, choices, failures, merged weights."""

from __future__ import annotations

import pytest

from loramux_adapters.errors import AdapterCorrupt, AdapterError, PoolExhausted
from loramux_server.engine.plan import BASE_SLOT, StepPlan
from loramux_server.requests import FinishReason, RequestFailure
from support.engine_drive import Drive, digest, limits, submission
from support.fake_pool import FakePool
from support.fake_runner import solo


def shapes(plan: StepPlan) -> list[tuple[int, int]]:
    """(start, tokens) of each chunk."""
    return [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks]


def test_a_request_runs_to_its_limit_and_equals_its_solo_run():
    drive = Drive()
    ticket = drive.submit(submission(prompt=5, max_tokens=4))
    plans = drive.run()
    assert [shapes(plan) for plan in plans] == [[(0, 5)], [(5, 1)], [(6, 1)], [(7, 1)]]
    assert [plan.step for plan in plans] == [1, 2, 3, 4]
    drive.check_equal_to_solo(ticket)
    end = drive.last(ticket)
    assert (end.finish, end.usage and end.usage.completion, end.usage and end.usage.prompt) == (
        FinishReason.LENGTH,
        4,
        5,
    )
    drive.check_idle()


def test_every_token_event_counts_usage_so_far():
    drive = Drive()
    ticket = drive.submit(submission(prompt=3, max_tokens=3))
    drive.run()
    assert [event.usage.completion for event in drive.events[ticket, 0] if event.usage] == [1, 2, 3]


def test_max_tokens_zero_computes_the_prompt_and_samples_nothing():
    drive = Drive()
    ticket = drive.submit(submission(prompt=40, max_tokens=0))
    plans = drive.run()
    assert not any(chunk.samples for plan in plans for chunk in plan.chunks)
    assert [event.finish for event in drive.events[ticket, 0]] == [FinishReason.LENGTH]
    drive.check_idle()


def test_decodes_come_first_and_prefill_chunks_fill_the_budget():
    drive = Drive(limits(max_batch_tokens=10))
    drive.submit(submission("a", prompt=4, max_tokens=9))
    drive.step()
    long = drive.submit(submission("b", prompt=[7] * 25, max_tokens=2))
    plans = [drive.step() for _ in range(4)]
    assert [shapes(plan) for plan in plans] == [
        [(4, 1), (0, 9)],
        [(5, 1), (9, 9)],
        [(6, 1), (18, 7)],
        [(7, 1), (25, 1)],
    ]
    assert [chunk.samples for chunk in plans[2].chunks] == [True, True]
    drive.check_equal_to_solo(long)


def test_several_requests_share_a_step_and_an_older_prefill_goes_first():
    drive = Drive(limits(max_batch_tokens=20))
    for name, prompt in (("a", 12), ("b", 12), ("c", 3)):
        drive.submit(submission(name, prompt=[ord(name)] * prompt))
    assert shapes(drive.step()) == [(0, 12), (0, 8)]
    assert shapes(drive.step()) == [(12, 1), (8, 4), (0, 3)]
    drive.run()
    drive.check_idle()


def test_no_more_run_than_allowed_and_the_rest_waits_for_capacity():
    drive = Drive(limits(max_running=2))
    for name in "abcd":
        drive.submit(submission(name, prompt=[ord(name)] * 3, max_tokens=2))
    assert len(drive.step().chunks) == 2
    assert drive.scheduler.load().waiting == {"capacity": 2}
    drive.run()
    drive.check_idle()


def test_a_newcomer_leaves_those_that_run_a_block_each():
    """Admitted into the last blocks it would be sent back at once: 14 preemptions here, not 1."""
    drive = Drive(limits(kv_blocks=12, prefix_cache=False, max_batch_tokens=64))
    tickets = [drive.submit(submission(f"r{index}", prompt=[index] * 11, max_tokens=12)) for index in range(16)]
    drive.run()
    assert drive.scheduler.take_counters().preemptions <= 4
    for ticket in tickets:
        drive.check_equal_to_solo(ticket)


def test_a_better_priority_is_admitted_first():
    drive = Drive(limits(max_running=1))
    drive.submit(submission("late", prompt=3, priority=5))
    drive.submit(submission("soon", prompt=3, priority=-1))
    assert "soon" in drive.step().chunks[0].request_id


def test_a_stop_token_ends_with_the_token_in_the_event():
    what = submission(prompt=5, max_tokens=8)
    third = solo(what)[0][2]
    drive = Drive()
    ticket = drive.submit(submission(prompt=5, max_tokens=8, stop={"stop_token_ids": frozenset({third})}))
    drive.run()
    end = drive.last(ticket)
    assert (end.finish, end.token, end.stop_token) == (FinishReason.STOP, third, third)
    drive.check_equal_to_solo(ticket)


@pytest.mark.parametrize(("ignored", "finish"), [(False, FinishReason.STOP), (True, FinishReason.LENGTH)])
def test_eos_ends_unless_ignored(ignored: bool, finish: FinishReason):
    first = solo(submission(prompt=5))[0][0]
    stop = {"eos_token_ids": frozenset({first}), "ignore_eos": ignored}
    drive = Drive()
    ticket = drive.submit(submission(prompt=5, stop=stop))
    drive.run()
    assert drive.last(ticket).finish is finish
    drive.check_equal_to_solo(ticket)


def test_a_stop_token_before_min_tokens_does_not_end():
    tokens = solo(submission(prompt=5, max_tokens=6))[0]
    stop = {"stop_token_ids": frozenset({tokens[1]}), "min_tokens": 2}
    drive = Drive()
    ticket = drive.submit(submission(prompt=5, max_tokens=6, stop=stop))
    drive.run()
    assert len(drive.tokens(ticket)) > 2
    drive.check_equal_to_solo(ticket)


def test_choices_differ_share_the_prompt_and_end_each_once():
    drive = Drive()
    ticket = drive.submit(submission(prompt=9, n=3, max_tokens=3, sampling={"prompt_logprobs": 0}))
    assert shapes(drive.step()) == [(0, 9)]
    assert drive.scheduler.load().waiting == {"sibling": 2}
    assert shapes(drive.step()) == [(9, 1), (8, 1), (8, 1)]
    drive.run()
    drive.check_equal_to_solo(ticket)
    assert len({tuple(drive.tokens(ticket, choice)) for choice in range(3)}) == 3
    assert [drive.events[ticket, choice][0].prompt_logprobs is None for choice in range(3)] == [False, True, True]
    drive.check_idle()


def test_choices_go_on_when_the_first_is_ended_before_its_prompt_is_done():
    drive = Drive(limits(max_batch_tokens=8))
    ticket = drive.submit(submission(prompt=20, n=2))
    drive.step()
    drive.finish(ticket, 0)
    drive.run()
    assert drive.tokens(ticket, 1) == solo(drive.submitted[ticket], 1)[0]
    drive.check_idle()


def test_retired_ids_are_told_once_and_only_of_requests_the_runner_saw():
    drive = Drive(limits(max_running=1))
    first = drive.submit(submission("a", prompt=3, max_tokens=1))
    waiting = drive.submit(submission("b", prompt=3))
    drive.step()
    drive.abort(waiting)
    drive.submit(submission("c", prompt=3, max_tokens=2))
    plans = drive.run()
    retired = [key for plan in drive.runner.plans for key in plan.retired]
    assert retired == [plans[0].retired[0]] == ["1:a#0"]
    assert drive.last(first).finish is FinishReason.LENGTH


def test_an_aborted_request_is_gone_before_the_next_step():
    drive = Drive()
    ticket = drive.submit(submission(prompt=5, max_tokens=50, digest=digest(1), n=2))
    other = drive.submit(submission("o", prompt=5))
    drive.step()
    drive.step()
    drive.abort(ticket)
    drive.abort(ticket)
    assert [drive.last(ticket, choice).finish for choice in (0, 1)] == [FinishReason.ABORTED] * 2
    assert drive.pool.leased == 0
    drive.run()
    drive.check_equal_to_solo(other)
    drive.check_idle()


def test_a_deadline_frees_blocks_and_lease_within_one_step():
    drive = Drive(limits(max_batch_tokens=8))
    ticket = drive.submit(submission(prompt=40, digest=digest(1), deadline=2.5))
    drive.step()
    drive.step()
    assert drive.pool.leased == 1
    assert drive.step().chunks == ()
    failure = drive.last(ticket).failure
    assert failure is not None
    assert failure.code == "DEADLINE"
    drive.check_idle()


def test_a_waiting_request_meets_its_deadline_too_and_others_keep_theirs():
    drive = Drive(limits(max_running=1))
    drive.submit(submission("a", prompt=3, max_tokens=9, deadline=100.0))
    waiting = drive.submit(submission("b", prompt=3, deadline=1.5))
    drive.step()
    assert drive.scheduler.next_deadline == 1.5
    drive.step()
    failure = drive.last(waiting).failure
    assert failure is not None
    assert failure.code == "DEADLINE"
    assert drive.scheduler.next_deadline == 100.0
    drive.run()
    drive.check_idle()


def test_what_can_never_fit_fails_at_once():
    drive = Drive(limits(kv_blocks=4))
    ticket = drive.submit(submission(prompt=10, max_tokens=8))
    failure = drive.last(ticket).failure
    assert failure is not None
    assert failure.code == "TOO_LARGE"
    fits = drive.submit(submission(prompt=10, max_tokens=7))
    drive.run()
    drive.check_equal_to_solo(fits)


def test_a_request_that_fails_in_a_step_hurts_nobody_and_leaves_no_prefix():
    drive = Drive()
    bad = drive.submit(submission("bad", prompt=8))
    good = drive.submit(submission("good", prompt=[9] * 8))
    drive.runner.inject = lambda plan: {"1:bad#0": RequestFailure("NUMERIC", "logits are not finite")}
    drive.step()
    drive.runner.inject = None
    drive.run()
    failure = drive.last(bad).failure
    assert failure is not None
    assert failure.code == "NUMERIC"
    drive.check_equal_to_solo(good)
    drive.submit(submission("again", prompt=8))
    assert shapes(drive.step()) == [(0, 8)]


def test_a_step_that_forgets_a_request_fails_it():
    drive = Drive()
    ticket = drive.submit(submission(prompt=5))
    plan = drive.scheduler.plan(1.0)
    drive.scheduler.commit(plan, type(drive.runner.execute(plan))(plan.step, {}), 1.0)
    ((_, event),) = drive.scheduler.take_events()
    assert event.failure is not None
    assert event.failure.code == "INTERNAL"
    assert drive.scheduler.is_idle
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
    drive = Drive(pool=FakePool(2))
    bad = drive.submit(submission("a", digest=digest(1)))
    good = drive.submit(submission("b", digest=digest(2)))
    drive.step()
    drive.pool.report(digest(1), error)
    drive.run()
    failure = drive.last(bad).failure
    assert failure is not None
    assert failure.code == code
    drive.check_equal_to_solo(good)
    drive.check_idle()


def test_others_pass_a_request_whose_adapter_is_loading():
    drive = Drive(pool=FakePool(2))
    slow = drive.submit(submission("a", digest=digest(1), prompt=[1] * 5))
    base = drive.submit(submission("b", prompt=[2] * 5))
    assert [chunk.request_id for chunk in drive.step().chunks] == ["2:b#0"]
    assert drive.scheduler.load().waiting == {"adapter": 1}
    drive.run()
    drive.check_equal_to_solo(slow)
    drive.check_equal_to_solo(base)


def test_rows_carry_their_slot_and_leases_end_with_requests():
    drive = Drive(pool=FakePool(3, at_once=True))
    drive.submit(submission("a", digest=digest(1), max_tokens=1))
    drive.submit(submission("b", digest=digest(2), max_tokens=2))
    drive.submit(submission("c", max_tokens=2))
    assert [chunk.slot for chunk in drive.step().chunks] == [0, 1, BASE_SLOT]
    assert drive.pool.leases == {digest(1): 0, digest(2): 1}
    drive.run()
    drive.check_idle()


def test_a_merged_serves_steps_of_its_adapter_alone():
    ready: set[str] = set()
    drive = Drive(ready=lambda: frozenset(ready))
    drive.submit(submission("a", digest=digest(1), max_tokens=20))
    assert drive.step().merged is None
    ready.add(digest(1))
    assert drive.step().merged == digest(1)
    other = drive.submit(submission("b", digest=digest(2), max_tokens=1))
    assert drive.step().merged is None
    drive.check_equal_to_solo(other)
    assert drive.step().merged == digest(1)
    drive.submit(submission("c", max_tokens=1))
    assert drive.step().merged is None
    drive.run()
    drive.check_idle()


def test_history_comes_with_the_first_chunk_of_requests_that_need_it():
    drive = Drive()
    drive.submit(submission("a", prompt=9))
    drive.run()
    drive.submit(submission("b", prompt=9, sampling={"presence_penalty": 1.0}))
    plans = drive.run()
    assert [chunk.history for plan in plans for chunk in plan.chunks] == [tuple(range(8)), None, None, None]


def test_marks_and_load_tell_what_happened():
    drive = Drive()
    drive.submit(submission("a", prompt=8, max_tokens=3, digest=digest(1)))
    drive.step()
    load = drive.scheduler.load()
    assert (load.running, load.running_adapters, load.kv_blocks_held) == (1, frozenset({digest(1)}), 2)
    drive.run()
    drive.submit(submission("b", prompt=8, max_tokens=1, digest=digest(1)))
    drive.run()
    marks = drive.scheduler.take_counters()
    assert (marks.queued, marks.first_token, marks.inter_token) == ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    assert (marks.prefix_queried, marks.prefix_hit, marks.preemptions) == (16, 4, 0)
    assert [(ended.outcome, ended.seconds, ended.completion) for ended in marks.ended] == [
        ("length", 3.0, 3),
        ("length", 1.0, 1),
    ]
    assert drive.scheduler.take_counters().ended == []

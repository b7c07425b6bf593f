"""The prefix cache as requests see it: what is found, what never is, what it costs."""

from __future__ import annotations

import pytest

from loramux_server.engine.plan import StepPlan
from loramux_server.requests import RequestFailure
from support.scheduler_harness import SchedulerHarness, digest, limits, submission


def shapes(plan: StepPlan) -> list[tuple[int, int]]:
    """(start, tokens) of each chunk."""
    return [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks]


def test_equal_prompts_share_blocks_and_recompute_at_least_the_last_token():
    harness = SchedulerHarness()
    first = harness.submit(submission("a", prompt=8))
    harness.run()
    second = harness.submit(submission("b", prompt=8))
    plan = harness.step()
    assert shapes(plan) == [(4, 4)]
    harness.run()
    harness.check_equal_to_solo(first)
    harness.check_equal_to_solo(second)
    end = harness.last(second)
    assert end.usage is not None
    assert end.usage.cached == 4


def test_output_is_found_again_as_the_next_turn_of_a_talk():
    harness = SchedulerHarness()
    ticket = harness.submit(submission("a", prompt=6, max_tokens=7))
    harness.run()
    harness.submit(submission("b", prompt=[*range(6), *harness.tokens(ticket), 1, 2]))
    assert shapes(harness.step()) == [(12, 3)]


@pytest.mark.parametrize("other", [{"digest": digest(1)}, {"tenant": "other"}, {"cache_salt": "s"}])
def test_no_hit_across_adapter_tenant_or_salt(other: dict[str, str]):
    harness = SchedulerHarness()
    harness.submit(submission("a", prompt=9))
    harness.run()
    ticket = harness.submit(submission("b", prompt=9, **other))
    assert shapes(harness.step()) == [(0, 9)]
    harness.run()
    harness.check_equal_to_solo(ticket)


def test_no_cache_no_hit():
    harness = SchedulerHarness(limits(prefix_cache=False))
    for name in "ab":
        harness.submit(submission(name, prompt=9))
        assert shapes(harness.step()) == [(0, 9)]
        harness.run()
    harness.check_idle()


def test_prompt_logprobs_read_no_cached_blocks_and_come_once_before_the_first_token():
    harness = SchedulerHarness(limits(max_batch_tokens=10))
    harness.submit(submission("a", prompt=20))
    harness.run()
    ticket = harness.submit(submission("b", prompt=20, sampling={"prompt_logprobs": 0}))
    plans = harness.run()
    assert shapes(plans[0]) == [(0, 10)]
    first, *rest = harness.events[ticket, 0]
    assert first.token is None
    assert first.prompt_logprobs is not None
    assert [entry and entry.token for entry in first.prompt_logprobs] == [None, *range(1, 20)]
    assert all(event.prompt_logprobs is None for event in rest)
    assert plans[-1].chunks[0].params.prompt_logprobs is None


def test_blocks_that_were_shared_with_a_failed_request_are_not_found_again():
    harness = SchedulerHarness()
    harness.submit(submission("a", prompt=9))
    harness.run()
    harness.submit(submission("bad", prompt=12))
    harness.runner.inject = lambda plan: {chunk.request_id: RequestFailure("NUMERIC", "") for chunk in plan.chunks}
    assert shapes(harness.step()) == [(8, 4)]
    harness.runner.inject = None
    harness.submit(submission("b", prompt=9))
    assert shapes(harness.step()) == [(0, 9)]


@pytest.mark.parametrize(("steps", "in_doubt"), [(1, True), (2, True), (3, False), (4, False)])
def test_kv_from_which_no_token_was_drawn_is_in_doubt(steps: int, in_doubt: bool):
    """NaN shows only in logits: a prompt of three chunks that is aborted before the third may hold it."""
    harness = SchedulerHarness(limits(max_batch_tokens=8))
    ticket = harness.submit(submission("a", prompt=20, max_tokens=9))
    for _ in range(steps):
        plan = harness.step()
    assert plan.chunks[0].samples is not in_doubt
    harness.abort(ticket)
    harness.submit(submission("b", prompt=20))
    plan = harness.step()
    assert plan.chunks[0].start == (0 if in_doubt else 16)


def test_sharing_an_idle_block_takes_from_what_is_available():
    """Of 5 blocks 2 are cached, 2 run and 1 is blank: a prompt of 4 blocks does not fit although 2 are found."""
    harness = SchedulerHarness(limits(kv_blocks=5))
    harness.submit(submission("a", prompt=8, max_tokens=1))
    harness.run()
    harness.submit(submission("b", prompt=[50] * 7, max_tokens=2))
    harness.step()
    ticket = harness.submit(submission("c", prompt=16, max_tokens=2))
    harness.step()
    assert harness.scheduler.load().waiting == {"blocks": 1}
    harness.run()
    harness.check_equal_to_solo(ticket)
    harness.check_idle()


def test_kv_of_an_adapter_that_is_gone_makes_room_first():
    """Its blocks are the most recently used ones, and those of the other would go before them."""
    harness = SchedulerHarness(limits(kv_blocks=12))
    harness.submit(submission("kept", prompt=16, digest=digest(1)))
    harness.run()
    harness.submit(submission("gone", prompt=16, digest=digest(2)))
    harness.run()
    harness.pool.gone = [digest(2)]
    ticket = harness.submit(submission("base", prompt=[*range(100, 116)]))
    harness.run()
    harness.check_equal_to_solo(ticket)
    again = harness.submit(submission("again", prompt=16, digest=digest(1)))
    harness.run()
    harness.check_equal_to_solo(again)
    end = harness.last(again)
    assert end.usage is not None
    assert end.usage.cached == 12
    uploaded_again = harness.submit(submission("back", prompt=16, digest=digest(2)))
    harness.run()
    harness.check_equal_to_solo(uploaded_again)
    end = harness.last(uploaded_again)
    assert end.usage is not None
    assert end.usage.cached == 0


def test_a_request_that_runs_on_what_is_gone_keeps_its_blocks():
    harness = SchedulerHarness()
    ticket = harness.submit(submission("a", prompt=16, max_tokens=8, digest=digest(2)))
    harness.step()
    harness.pool.gone = [digest(2)]
    harness.run()
    harness.check_equal_to_solo(ticket)
    harness.scheduler.check()

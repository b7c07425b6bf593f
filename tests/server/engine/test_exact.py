"""Deterministic mode: a request is cut into the same chunks whoever else runs, also after cache hits and preemption."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.request import Request, expand
from loramux_server.engine.step_builder import StepBuilder
from loramux_server.engine.tables import BlockTables
from support.scheduler_harness import SchedulerHarness, digest, limits, submission

CHUNK = 8


def exact(**changes: object) -> SchedulerHarness:
    bounds = {"deterministic": True, "max_batch_tokens": 16, "max_running": 4, **changes}
    return SchedulerHarness(limits(**bounds), ready=lambda: frozenset({digest(1)}))


def cuts(harness: SchedulerHarness, ticket: int, since: int = 0) -> set[tuple[int, int]]:
    """(start, end) of every chunk a request was computed in, from plan number `since` on."""
    return {
        (chunk.start, chunk.start + len(chunk.tokens))
        for plan in harness.runner.plans[since:]
        for chunk in plan.chunks
        if chunk.request_id.startswith(f"{ticket}:")
    }


def test_prefill_chunks_are_whole_or_the_rest():
    harness = exact()
    ticket = harness.submit(submission(prompt=21, max_tokens=3))
    harness.run()
    assert cuts(harness, ticket) == {(0, 8), (8, 16), (16, 21), (21, 22), (22, 23)}


def test_a_chunk_that_does_not_fit_waits():
    harness = exact(max_running=9)
    harness.submit(submission("a", prompt=[1] * 5, max_tokens=20))
    harness.submit(submission("b", prompt=[2] * 16))
    harness.submit(submission("c", prompt=[3] * 16))
    assert [(chunk.start, len(chunk.tokens)) for chunk in harness.step().chunks] == [(0, 5), (0, 8)]
    assert [(chunk.start, len(chunk.tokens)) for chunk in harness.step().chunks] == [(5, 1), (8, 8)]
    harness.run()
    harness.check_idle()


def test_a_younger_prefill_does_not_pass_an_older_one_that_waits_for_room():
    bounds = exact().limits
    tables = BlockTables(bounds)

    def running(name: str, prompt: int, computed: int = 0) -> Request:
        [request] = expand(ord(name), submission(name, prompt=prompt), 0.0)
        tables.admit(request, ())
        request.computed = computed
        return request

    draft = StepBuilder(bounds, tables)
    decoding = running("d", 3, computed=2)
    draft.add(decoding, 3)
    draft.add_prefills([running("a", 20), running("b", 20), running("c", 5)])
    # 16 tokens: one decode, a whole chunk of a, and 7 left, in which b's has no room. c's would have.
    assert [(chunk.request_id, len(chunk.tokens)) for chunk in draft.chunks] == [("100:d#0", 1), ("97:a#0", 8)]


def test_cache_hits_end_on_chunk_boundaries_of_prompts():
    harness = exact()
    first = harness.submit(submission("a", prompt=15, max_tokens=12))
    harness.run()
    # 15 + 12 tokens: the second chunk was not whole, the third is output.
    talk = [*range(15), *harness.tokens(first)]
    harness.submit(submission("b", prompt=[*talk, 1]))
    assert [chunk.start for chunk in harness.step().chunks] == [8]


def test_no_hit_on_blocks_another_shape_of_step_wrote():
    harness = exact()
    first = harness.submit(submission("a", prompt=6, max_tokens=12))
    harness.run()
    harness.submit(submission("b", prompt=[*range(6), *harness.tokens(first), 1]))
    assert [chunk.start for chunk in harness.step().chunks] == [0]


def test_output_is_replayed_token_by_token_after_preemption():
    harness = exact(kv_blocks=9, prefix_cache=False)
    harness.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    ticket = harness.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    harness.run()
    assert harness.scheduler.take_counters().preemptions == 1
    assert cuts(harness, ticket) == {(0, 8), (8, 11)} | {(start, start + 1) for start in range(11, 24)}
    harness.check_equal_to_solo(ticket)
    harness.check_idle()


def test_a_resumed_request_reads_no_prefill_of_its_own_output():
    harness = exact(kv_blocks=24)
    ticket = harness.submit(submission("a", prompt=[1] * 8, max_tokens=20))
    for _ in range(12):
        harness.step()
    talk = [1] * 8 + harness.tokens(ticket)
    harness.submit(submission("b", prompt=[*talk, 5], max_tokens=1))
    for _ in range(4):
        harness.step()
    before = len(harness.runner.plans)
    harness.scheduler._preempt(harness.scheduler._live["1:a#0"])
    harness.run()
    # The other's prompt, which it shares, has whole chunks of what is output here: the first alone is its own prefill.
    assert cuts(harness, ticket, before) == {(start, start + 1) for start in range(8, 27)}
    harness.check_equal_to_solo(ticket)


def test_merged_adapters_are_off():
    harness = exact()
    harness.submit(submission(digest=digest(1)))
    assert all(plan.merged is None for plan in harness.run())


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=7),
    blocks=st.integers(11, 30),
)
def test_a_request_is_cut_alike_alone_and_among_batch_mates(shapes: list[tuple[int, int, int]], blocks: int):
    mixed = exact(kv_blocks=blocks)
    for index, (prompt, output, kind) in enumerate(shapes):
        mixed.submit(submission(f"r{index}", prompt=[kind] * prompt, max_tokens=output, digest=digest(kind)))
        if index % 2:
            mixed.step()
    mixed.run(3000)
    for ticket in mixed.submitted:
        alone = exact(kv_blocks=blocks)
        same = alone.submit(mixed.submitted[ticket])
        alone.run()
        assert cuts(mixed, ticket) <= cuts(alone, same)
        mixed.check_equal_to_solo(ticket)
    mixed.check_idle()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_batch_tokens": 10}, "raise it to 11"),
        ({"prefill_chunk": 6}, "no multiple of block_tokens"),
    ],
)
def test_limits_that_contradict_exactness_are_refused(changes: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words):
        exact(**changes)

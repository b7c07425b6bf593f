"""Deterministic mode: a request is cut into the same chunks whoever else runs, also after cache hits and preemption."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.request import Request, expand
from loramux_server.engine.step_builder import StepBuilder
from loramux_server.engine.tables import BlockTables
from support.engine_drive import Drive, digest, limits, submission

CHUNK = 8


def exact(**changes: object) -> Drive:
    bounds = {"deterministic": True, "max_batch_tokens": 16, "max_running": 4, **changes}
    return Drive(limits(**bounds), ready=lambda: frozenset({digest(1)}))


def cuts(drive: Drive, ticket: int, since: int = 0) -> set[tuple[int, int]]:
    """(start, end) of every chunk a request was computed in, from plan number `since` on."""
    return {
        (chunk.start, chunk.start + len(chunk.tokens))
        for plan in drive.runner.plans[since:]
        for chunk in plan.chunks
        if chunk.request_id.startswith(f"{ticket}:")
    }


def test_prefill_chunks_are_whole_or_the_rest():
    drive = exact()
    ticket = drive.submit(submission(prompt=21, max_tokens=3))
    drive.run()
    assert cuts(drive, ticket) == {(0, 8), (8, 16), (16, 21), (21, 22), (22, 23)}


def test_a_chunk_that_does_not_fit_waits():
    drive = exact(max_running=9)
    drive.submit(submission("a", prompt=[1] * 5, max_tokens=20))
    drive.submit(submission("b", prompt=[2] * 16))
    drive.submit(submission("c", prompt=[3] * 16))
    assert [(chunk.start, len(chunk.tokens)) for chunk in drive.step().chunks] == [(0, 5), (0, 8)]
    assert [(chunk.start, len(chunk.tokens)) for chunk in drive.step().chunks] == [(5, 1), (8, 8)]
    drive.run()
    drive.check_idle()


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
    drive = exact()
    first = drive.submit(submission("a", prompt=15, max_tokens=12))
    drive.run()
    # 15 + 12 tokens: the second chunk was not whole, the third is output.
    talk = [*range(15), *drive.tokens(first)]
    drive.submit(submission("b", prompt=[*talk, 1]))
    assert [chunk.start for chunk in drive.step().chunks] == [8]


def test_no_hit_on_blocks_another_shape_of_step_wrote():
    drive = exact()
    first = drive.submit(submission("a", prompt=6, max_tokens=12))
    drive.run()
    drive.submit(submission("b", prompt=[*range(6), *drive.tokens(first), 1]))
    assert [chunk.start for chunk in drive.step().chunks] == [0]


def test_output_is_replayed_token_by_token_after_preemption():
    drive = exact(kv_blocks=9, prefix_cache=False)
    drive.submit(submission("a", prompt=[1] * 11, max_tokens=14))
    ticket = drive.submit(submission("b", prompt=[2] * 11, max_tokens=14))
    drive.run()
    assert drive.scheduler.take_counters().preemptions == 1
    assert cuts(drive, ticket) == {(0, 8), (8, 11)} | {(start, start + 1) for start in range(11, 24)}
    drive.check_equal_to_solo(ticket)
    drive.check_idle()


def test_a_resumed_request_reads_no_prefill_of_its_own_output():
    drive = exact(kv_blocks=24)
    ticket = drive.submit(submission("a", prompt=[1] * 8, max_tokens=20))
    for _ in range(12):
        drive.step()
    talk = [1] * 8 + drive.tokens(ticket)
    drive.submit(submission("b", prompt=[*talk, 5], max_tokens=1))
    for _ in range(4):
        drive.step()
    before = len(drive.runner.plans)
    drive.scheduler._preempt(drive.scheduler._live["1:a#0"])
    drive.run()
    # The other's prompt, which it shares, has whole chunks of what is output here: the first alone is its own prefill.
    assert cuts(drive, ticket, before) == {(start, start + 1) for start in range(8, 27)}
    drive.check_equal_to_solo(ticket)


def test_merged_adapters_are_off():
    drive = exact()
    drive.submit(submission(digest=digest(1)))
    assert all(plan.merged is None for plan in drive.run())


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=7),
    blocks=st.integers(11, 30),
)
def test_a_request_is_cut_alike_alone_and_in_company(shapes: list[tuple[int, int, int]], blocks: int):
    company = exact(kv_blocks=blocks)
    for index, (prompt, output, kind) in enumerate(shapes):
        company.submit(submission(f"r{index}", prompt=[kind] * prompt, max_tokens=output, digest=digest(kind)))
        if index % 2:
            company.step()
    company.run(3000)
    for ticket in company.submitted:
        alone = exact(kv_blocks=blocks)
        same = alone.submit(company.submitted[ticket])
        alone.run()
        assert cuts(company, ticket) <= cuts(alone, same)
        company.check_equal_to_solo(ticket)
    company.check_idle()


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

"""Requests that say by which weights they are computed: what a certificate's replay asks."""

from __future__ import annotations

from support.scheduler_harness import SchedulerHarness, digest, limits, submission


def test_a_request_that_insists_has_merged_weights_and_no_other_beside_it_on_trial() -> None:
    """Also where they are not worth it, and of an adapter that others may not use merged yet."""
    harness = SchedulerHarness(limits(merged_rows=None), on_trial=lambda: frozenset({digest(1)}))
    harness.submit(submission("a", prompt=3, digest=digest(1), max_tokens=2))
    harness.submit(submission("b", prompt=3, digest=digest(1), max_tokens=2, route="merged"))
    harness.submit(submission("c", prompt=3, max_tokens=2))
    plan = harness.step()
    assert plan.merged == digest(1)
    assert [chunk.is_merged for chunk in plan.chunks] == [False, True, False]
    harness.run()
    harness.check_idle()


def test_beside_one_that_insists_others_of_its_adapter_are_merged_once_it_is_ready() -> None:
    harness = SchedulerHarness(limits(merged_rows=None), ready=lambda: frozenset({digest(1), digest(2)}))
    harness.submit(submission("a", prompt=3, digest=digest(1), max_tokens=1))
    harness.submit(submission("b", prompt=3, digest=digest(1), max_tokens=1, route="merged"))
    harness.submit(submission("c", prompt=9, digest=digest(2), max_tokens=1))
    plan = harness.step()
    assert plan.merged == digest(1)
    assert [chunk.is_merged for chunk in plan.chunks] == [True, True, False]


def test_a_request_that_wants_gathered_products_never_has_merged_weights() -> None:
    harness = SchedulerHarness(limits(merged_rows=1), ready=lambda: frozenset({digest(1)}))
    harness.submit(submission("a", digest=digest(1), max_tokens=2, route="gathered"))
    assert all(plan.merged is None for plan in harness.run())
    harness.submit(submission("b", digest=digest(1), max_tokens=2))
    assert all(plan.merged == digest(1) for plan in harness.run() if plan.chunks)

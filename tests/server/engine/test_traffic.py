"""Mixed traffic at random: submissions, aborts, deadlines, failures, slow loads, more adapters than slots, tiny KV.

Whatever happens to its neighbors, a request's tokens are the beginning of its solo run, all of it
if it ended by itself; each choice ends once; blocks and leases come back; nobody is skipped for ever.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loramux_adapters.errors import AdapterCorrupt
from loramux_server.engine.plan import StepOutOfMemory, StepPlan
from loramux_server.requests import FinishReason, RequestFailure
from support.fake_pool import FakePool
from support.fake_runner import solo
from support.scheduler_harness import SchedulerHarness, digest, limits, submission

SKIPS = 2
LIKELY_PREFIX = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


class Traffic(RuleBasedStateMachine):
    """One engine's decisions under whatever hypothesis does to it."""

    @initialize(
        kv_blocks=st.integers(9, 16),
        slots=st.integers(1, 3),
        running=st.sampled_from([1, 3, 5, 5]),
        tokens=st.integers(12, 32),
        deterministic=st.booleans(),
        caching=st.booleans(),
    )
    def start(self, kv_blocks: int, slots: int, running: int, tokens: int, deterministic: bool, caching: bool) -> None:
        bounds = limits(
            kv_blocks=kv_blocks,
            max_running=running,
            max_batch_tokens=tokens,
            max_skips=SKIPS,
            max_loads_tried=4,
            deterministic=deterministic,
            prefix_cache=caching,
        )
        self.harness = SchedulerHarness(bounds, FakePool(slots), ready=lambda: frozenset({digest(1)}))

    @rule(
        prefix=st.integers(0, 12),
        own=st.lists(st.integers(0, 3), max_size=6),
        output=st.sampled_from([16, 14, 12, 6, 3, 1, 0]),
        kind=st.sampled_from([0, 0, 1, 1, 1, 2, 2, 3, 4]),
        choices=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        salt=st.sampled_from(["", "s"]),
        patience=st.sampled_from([None, None, None, None, None, 3.0, 15.0]),
        penalty=st.sampled_from([0.0, 1.0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        ends=st.sampled_from([frozenset(), frozenset(), frozenset({1, 2, 3, 4, 5, 6})]),
    )
    def submit(
        self,
        prefix: int,
        own: list[int],
        output: int,
        kind: int,
        choices: int,
        priority: int,
        salt: str,
        patience: float | None,
        penalty: float,
        prompt_logprobs: int | None,
        ends: frozenset[int],
    ) -> None:
        harness = self.harness
        harness.submit(
            submission(
                f"r{len(harness.submitted)}",
                prompt=[*LIKELY_PREFIX[:prefix], *own, 0],
                max_tokens=output,
                n=choices,
                digest=digest(kind) if kind else None,
                priority=priority,
                cache_salt=salt,
                deadline=None if patience is None else harness.now + patience,
                stop={"stop_token_ids": ends},
                sampling={"presence_penalty": penalty, "prompt_logprobs": prompt_logprobs},
            )
        )

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @precondition(lambda self: len(self.harness.submitted) % 3 == 2)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(sorted(self.harness.submitted))))

    @precondition(lambda self: len(self.harness.submitted) % 3 == 2)
    @rule(data=st.data(), choice=st.integers(0, 2))
    def finish(self, data: st.DataObject, choice: int) -> None:
        self.harness.finish(data.draw(st.sampled_from(sorted(self.harness.submitted))), choice)

    @precondition(lambda self: self.harness.pool.loading)
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        which = data.draw(st.sampled_from(sorted(self.harness.pool.loading)))
        self.harness.pool.report(which, AdapterCorrupt("bytes differ") if fails else None)

    @precondition(lambda self: len(self.harness.submitted) % 4 == 3)
    @rule(what=st.sampled_from(["memory", "crash", "numeric"]), index=st.integers(0, 4))
    def step_badly(self, what: str, index: int) -> None:
        def inject(plan: StepPlan) -> dict[str, RequestFailure]:
            if what == "crash":
                raise RuntimeError("injected")
            if what == "memory" and len(plan.chunks) > index:
                raise StepOutOfMemory
            if what == "numeric":
                return {chunk.request_id: RequestFailure("NUMERIC", "") for chunk in plan.chunks[index : index + 1]}
            return {}

        self.harness.runner.inject = inject
        self.harness.step()
        self.harness.runner.inject = None

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.harness.scheduler.tables.pool.check()
        scheduler = self.harness.scheduler
        assert len(scheduler._running) <= self.harness.limits.max_running
        assert self.harness.pool.leased == sum(request.digest is not None for request in scheduler._running)
        for request in scheduler._live.values():
            assert request.skips <= SKIPS
        for plan in self.harness.runner.plans[-4:]:
            assert sum(len(chunk.tokens) for chunk in plan.chunks) <= self.harness.limits.max_batch_tokens

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.harness.run(5000)
        self.harness.check_idle()
        self.harness.submit(submission("last", prompt=1, max_tokens=1))
        self.harness.run()
        assert self.harness.runner.known == frozenset({f"{len(self.harness.submitted)}:last#0"}), "others were retired"
        for (ticket, choice), events in self.harness.events.items():
            tokens = self.harness.tokens(ticket, choice)
            alone, finish = solo(self.harness.submitted[ticket], choice)
            assert tokens == alone[: len(tokens)]
            end = events[-1]
            if end.finish is FinishReason.LENGTH or end.stop_token is not None:
                assert (tokens, end.finish) == (alone, finish)


Traffic.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase

"""StepPlans recorded on one worker and followed by a second in another process give the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_server.engine.plan import StepOutOfMemory, StepPlan, StepResult
from loramux_server.model.runner import ModelRunner
from loramux_server.model.worker import Worker
from loramux_server.requests import SamplingParams
from support.against_peft import engine_for, prompts
from support.checkpoints import make_adapter_for, save_checkpoint, wide_model
from support.model_engine import ModelEngine
from support.processes import environment
from support.replay import PLAN, tokens_of


class Recorder:
    """Writes every plan that a worker executed, and what it gave."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.plans: list[StepPlan] = []
        self.tokens: list[dict[str, int]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        try:
            result = self._worker.execute(plan)
        except StepOutOfMemory:  # its commands were taken in
            self.plans.append(replace(plan, chunks=()))
            self.tokens.append({})
            raise
        self.plans.append(plan)
        self.tokens.append(tokens_of(result))
        return result

    @property
    def is_busy(self) -> bool:
        return self._worker.is_busy


def mixed_traffic(engine: ModelEngine) -> None:
    """More adapters than rank rows, every kind of sampling state, preemption, and one adapter merged for a while."""
    a, hot = engine.digests["a"], engine.digests["b"]
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 7, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "prompt_logprobs": 1},
        {"temperature": 0.5, "seed": 1, "logit_bias": {5: 2.0, 11: -100.0}, "logprobs": 2, "frequency_penalty": 0.5},
    ]
    names = [None, "a", "b", "c", "d"]
    for _ in range(2):  # the second time prompts are cached
        for index, prompt in enumerate(prompts(10)):
            sampling = SamplingParams(**samplings[index % 4])
            engine.submit(names[index % 5], prompt, 24, sampling=sampling)
        engine.run()
    engine.merged_weights.reconcile(frozenset({a, hot}))
    engine.settle_merges()
    for prompt in prompts(3):
        engine.submit("b", prompt, 4)
    engine.run()
    engine.merged_weights.reconcile(frozenset({a}))
    engine.submit("b", prompts(4)[3], 4)
    engine.run()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(wide_model("llama"), tmp_path_factory.mktemp("replay") / "base")


def test_a_second_worker_gives_the_same_tokens(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {
        name: make_adapter_for(checkpoint, tmp_path / name, seed=rank, r=rank, target_modules="all-linear")
        for name, rank in zip("abcd", (4, 8, 3, 16), strict=True)
    }
    engine = engine_for(checkpoint, adapters, capacity=16, kv_blocks=32, block_tokens=4, max_running=6)
    recorder = Recorder(engine.worker)
    engine.worker = recorder  # type: ignore[assignment]
    original, calls = ModelRunner._forward, [0]

    def forward(self: ModelRunner, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] % 9 == 0:  # now and then a step fails and comes again in halves
            raise MemoryError
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_forward", forward)
        mixed_traffic(engine)

    lines = [PLAN.dump_json(plan).decode() for plan in recorder.plans]
    assert [PLAN.validate_json(line) for line in lines] == recorder.plans
    recorded = tmp_path / "plans.jsonl"
    recorded.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "support.replay", str(checkpoint), str(recorded)]
        + [f"{name}={path}" for name, path in adapters.items()],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == recorder.tokens

    # What makes it worth replaying.
    assert engine.pool.stats().evictions > 3
    assert engine.scheduler.take_counters().preemptions > 0
    used = recorder.plans
    assert any(plan.merged for plan in used)
    assert any(plan.unmerge for plan in used)
    assert any(plan.unbind for plan in used)
    assert any(chunk.history for plan in used for chunk in plan.chunks)
    assert len({plan.step for plan in used}) < len(used)  # halves

"""A second worker, in a process of its own, that follows recorded StepPlans from plain JSON.

`python -m support.replay CHECKPOINT PLANS [NAME=DIRECTORY ...]` prints one JSON line per plan: request id -> token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

from loramux_adapters.errors import AdapterError
from loramux_server.engine.plan import StepPlan, StepResult
from support.against_peft import engine_for
from support.model_engine import ModelEngine

PLAN = TypeAdapter(StepPlan)


def tokens_of(result: StepResult) -> dict[str, int]:
    """What a step drew."""
    return {request_id: sampled.token for request_id, sampled in result.sampled.items()}


def follow(engine: ModelEngine, plan: StepPlan) -> StepResult:
    """Executes a plan that another scheduler made: what it binds and merges is read here, by digest."""
    for binding in plan.bind:
        engine.staged.stage(binding.slot, engine.weights[binding.digest], binding.rank_ranges, _raise)
    for merge in plan.merge:
        engine.merges.put(merge.number, engine.weights[merge.digest], _raise)
    return engine.worker.execute(plan)


def _raise(error: AdapterError | None) -> None:
    if error is not None:
        raise error


def main() -> None:
    """See the module."""
    checkpoint, plans, *adapters = sys.argv[1:]
    named = {name: Path(path) for name, _, path in (each.partition("=") for each in adapters)}
    engine = engine_for(Path(checkpoint), named, capacity=16)
    for line in Path(plans).read_text().splitlines():
        print(json.dumps(tokens_of(follow(engine, PLAN.validate_json(line)))))


if __name__ == "__main__":
    main()

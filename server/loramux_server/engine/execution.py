"""Runs one plan and always has a result: what goes wrong in the runner ends the request at fault and no other.

Only a lost device is passed on, as no later step can run either. Knows the runner's protocol and exceptions; knows no
request.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from loramux_server.engine.plan import DeviceLost, StepOutOfMemory, StepPlan, StepResult, StepTiming
from loramux_server.requests import RequestFailure

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Whatever computes steps: the only holder of the device."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every chunk of `plan`.

        Raises StepOutOfMemory when the step is too large, DeviceLost when the device can compute nothing any more, and
        whatever else goes wrong. After all but DeviceLost the same chunks come again in smaller plans of the same step
        number: a step that failed must leave nothing behind that would change what they give.
        """
        ...


def run_contained(runner: Runner, plan: StepPlan) -> StepResult:
    """`runner.run(plan)`; a step that fails is run again in halves until the requests at fault fail alone.

    Raises DeviceLost.
    """
    try:
        return runner.run(plan)
    except DeviceLost:
        raise
    except (StepOutOfMemory, MemoryError):
        if len(plan.chunks) == 1:
            logger.warning("step %d: out of memory with one request", plan.step)
            return _fail_all(plan, RequestFailure("OUT_OF_MEMORY", "there is not enough memory to run this request"))
        logger.warning("step %d: out of memory with %d requests, running halves", plan.step, len(plan.chunks))
    except Exception:
        if len(plan.chunks) == 1:
            logger.exception("step %d failed; request %s ends", plan.step, plan.chunks[0].request_id)
            return _fail_all(plan, RequestFailure("INTERNAL", "the step that computed this request failed"))
        logger.warning("step %d failed with %d requests, running halves", plan.step, len(plan.chunks), exc_info=True)
    middle = len(plan.chunks) // 2
    # What comes before the forward goes with the first half, again: the runner may not have come to it.
    first = run_contained(runner, replace(plan, chunks=plan.chunks[:middle]))
    second = run_contained(runner, replace(plan, chunks=plan.chunks[middle:], retired=()))
    return _merge(first, second)


def _fail_all(plan: StepPlan, failure: RequestFailure) -> StepResult:
    return StepResult(plan.step, sampled={}, failures={chunk.request_id: failure for chunk in plan.chunks})


def _merge(first: StepResult, second: StepResult) -> StepResult:
    a, b = first.timing, second.timing
    return StepResult(
        first.step,
        sampled={**first.sampled, **second.sampled},
        prompt_logprobs={**first.prompt_logprobs, **second.prompt_logprobs},
        failures={**first.failures, **second.failures},
        timing=StepTiming(a.prepare + b.prepare, a.forward + b.forward, a.sample + b.sample),
    )

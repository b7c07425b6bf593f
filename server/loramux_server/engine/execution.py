"""Executes one plan and always has a result: what goes wrong in a step ends the request at fault and no other.

Only a lost worker is passed on, as no later step can run either. Knows the worker's protocol and exceptions; knows no
request.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from loramux_server.engine.plan import StepOutOfMemory, StepPlan, StepResult, StepTiming, WorkerLost
from loramux_server.requests import RequestFailure

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """The sole owner of the device. Every method belongs to the engine thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Take in the commands of `plan`, compute every chunk, and do a bounded share of what else waits.

        Raises StepOutOfMemory when the step is too large, WorkerLost when no later step can run, and whatever else goes
        wrong. After all but WorkerLost the same chunks come again in smaller plans of the same step number: a step that
        failed must leave nothing behind that would change what they give.
        """
        ...

    @property
    def is_busy(self) -> bool:
        """Whether something waits that a plan without chunks would bring forward."""
        ...


def execute_contained(worker: Worker, plan: StepPlan) -> StepResult:
    """`worker.execute(plan)`; a step that fails is executed again in halves until the requests at fault fail alone.

    Raises WorkerLost.
    """
    try:
        return worker.execute(plan)
    except WorkerLost:
        raise
    except (StepOutOfMemory, MemoryError):
        if not plan.chunks:
            logger.warning("step %d: out of memory without a request", plan.step)
            return StepResult(plan.step, {})
        if len(plan.chunks) == 1:
            logger.warning("step %d: out of memory with one request", plan.step)
            return _fail_all(plan, RequestFailure("OUT_OF_MEMORY", "there is not enough memory to run this request"))
        logger.warning("step %d: out of memory with %d requests, running halves", plan.step, len(plan.chunks))
    except Exception:
        if not plan.chunks:
            raise
        if len(plan.chunks) == 1:
            logger.exception("step %d failed; request %s ends", plan.step, plan.chunks[0].request_id)
            return _fail_all(plan, RequestFailure("INTERNAL", "the step that computed this request failed"))
        logger.warning("step %d failed with %d requests, running halves", plan.step, len(plan.chunks), exc_info=True)
    middle = len(plan.chunks) // 2
    # The commands go with the first half, again: the worker may not have come to them.
    first = execute_contained(worker, replace(plan, chunks=plan.chunks[:middle]))
    second = execute_contained(worker, StepPlan(plan.step, plan.chunks[middle:], plan.merged))
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

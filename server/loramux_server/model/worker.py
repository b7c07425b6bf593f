"""The sole owner of the device while serving: model, KV cache, sampler, slots and merged weights.

It follows StepPlans, one after the other, on one thread. Other threads leave finished host tensors with
`StagedAdapters` and `Merges`; nobody else touches what lies on the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from loramux_adapters.binding import Binding
from loramux_adapters.device import use_device
from loramux_server.engine.plan import BASE_SLOT, DeviceLost, StepOutOfMemory, StepPlan, StepResult, WorkerLost
from loramux_server.model.faults import is_device_lost, is_out_of_memory
from loramux_server.model.merging import Merges
from loramux_server.model.runner import ModelRunner
from loramux_server.model.staging import StagedAdapters
from loramux_server.model.verification import Verification

COPY_BYTES = 4 << 20
"""Bytes of adapters copied after each step at most (but for one piece): what a step may become longer by."""

_RETRY_SECONDS = 0.2


class Worker:
    """Implements `engine.execution.Worker`."""

    def __init__(self, runner: ModelRunner, staged: StagedAdapters, merges: Merges, verification: Verification) -> None:
        self._runner, self._staged, self._merges, self._verification = runner, staged, merges, verification
        self._bound: set[int] = set()
        self._step = -1
        self._retired: set[str] = set()  # to be forgotten by the runner
        self._commands: deque[Callable[[], None]] = deque()
        self._retry_at = 0.0  # when commands that met no memory are worth another try, if no request runs

    @property
    def is_busy(self) -> bool:
        """Whether adapters wait to be copied or merged, the base to be verified, or commands to be tried again."""
        if self._commands:  # nothing else goes forward before them
            return time.monotonic() >= self._retry_at
        return not (self._staged.is_empty and self._merges.is_empty) or self._verification.is_due

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Commands, forward, draw; then the next bytes and the next group of what is to be copied and merged.

        Raises StepOutOfMemory, WorkerLost (DeviceLost after a fault the process cannot recover from), and whatever goes
        wrong in the forward or the draw. A second plan of the same step brings chunks only.
        """
        self._take_in(plan)
        try:
            use_device(self._runner.adapted.base.device)  # of the thread that calls: the engine's
            self._follow_commands()
            result = self._run(plan)
            # Last: a step that fails and comes again finds every slot as its commands left it.
            self._staged.advance(COPY_BYTES)
            self._merges.advance()
            self._verification.advance(is_idle=not plan.chunks)
            return result
        except BaseException as error:
            if is_out_of_memory(error):
                raise StepOutOfMemory(str(error)) from error
            if is_device_lost(error):
                raise DeviceLost(str(error)) from error
            raise

    def _take_in(self, plan: StepPlan) -> None:
        if plan.step != self._step:
            try:
                # Whatever an error left of an earlier plan comes first: no command is ever skipped.
                self._retired.update(plan.retired)  # a step that failed brings its own again
                self._commands += [partial(self._merges.drop, number) for number in plan.unmerge]
                self._commands += [partial(self._merges.begin, merge) for merge in plan.merge]
                self._commands += [partial(self._unbind, slot) for slot in plan.unbind]
                self._commands += [partial(self._bind, binding) for binding in plan.bind]
            except BaseException as error:  # they do not come again, see `execute_contained`
                raise WorkerLost(f"the commands of step {plan.step} could not be taken in") from error
            self._step = plan.step

    def _follow_commands(self) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        self._runner.retire(self._retired)
        self._retired.clear()
        while self._commands:
            self._commands[0]()
            self._commands.popleft()

    def _unbind(self, slot: int) -> None:
        self._staged.unbind(slot)
        self._bound.discard(slot)

    def _bind(self, binding: Binding) -> None:
        self._bound.add(binding.slot)  # first: no row is computed while a command is left
        self._staged.bind(binding)

    def _run(self, plan: StepPlan) -> StepResult:
        if not plan.chunks:
            return StepResult(plan.step, {})
        for chunk in plan.chunks:
            if chunk.slot != BASE_SLOT and chunk.slot not in self._bound:
                # Its rows would be the base's, in the adapter's name.
                raise ValueError(f"{chunk.request_id} is to use slot {chunk.slot}, to which nothing is bound")
        merged = None if plan.merged is None else self._merges.find(plan.merged)
        return self._runner.run(plan.step, plan.chunks, merged)

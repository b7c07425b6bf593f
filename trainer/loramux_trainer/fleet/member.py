"""One job in a fleet: its adapter, loss, optimizer, schedule and order of data, and how far it has come.

Nothing of it is shared with other members, and nothing of it depends on them: its whole state is its weights, its
optimizer and a step number. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from loramux_trainer.data.examples import Unit
from loramux_trainer.errors import CheckpointInvalid
from loramux_trainer.fleet.micro_batch import cut_by_tokens
from loramux_trainer.fleet.parameters import FlatParameters, ParameterGroup
from loramux_trainer.fleet.parts import StepParts
from loramux_trainer.losses.protocol import Loss, Totals
from loramux_trainer.losses.reference import PrecomputedReference
from loramux_trainer.optimizers.interface import MemberOptimizer
from loramux_trainer.progress import StepReport

State = Literal["running", "waiting", "finished", "diverged", "stopped"]
"""Waiting: for others, to go on with them."""


class Adapter(Protocol):
    """What a member trains."""

    @property
    def parameters(self) -> FlatParameters:
        """Its trained tensors."""
        ...

    @property
    def virtual_tokens(self) -> int:
        """Positions before every sequence."""
        ...

    def parts(self, *, with_gradients: bool) -> StepParts:
        """What the tensors come to now. Raises AdapterError where that is not finite."""
        ...

    def wants_gradients(self, step: int) -> tuple[str, ...]:
        """Modules whose frozen weights' gradients it asks for before 0-based `step`."""
        ...

    def take_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """They [out, in], by module."""
        ...

    def after_step(self, step: int) -> None:
        """After the optimizer's 1-based `step`; the gradients are still there."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state beside the parameters."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over such a state. Raises KeyError or RuntimeError where it is another's."""
        ...


class Order(Protocol):
    """Which units make which step: a pure function of the step."""

    def micro_batches(self, step: int) -> Sequence[Sequence[int]]:
        """Indices of the units of 0-based `step`, one list per micro-batch."""
        ...


CHUNK_TOKENS = 2048
"""A micro-batch of more tokens is cut between its units, also in a fleet of one: more at once is slower on a CPU, for
want of cache, and takes memory."""


@dataclass(frozen=True)
class MemberOptions:
    """What a job says of its steps."""

    total_steps: int
    rate: Callable[[int], float]  # 0-based step -> learning rate
    max_grad_norm: float | None = 1.0
    dropout: float = 0.0
    seed: int = 0
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(frozen=True, eq=False)
class UnitChunk:
    """Units that are computed at once, and their indices in the member's data."""

    number: int
    units: tuple[Unit, ...]
    indices: tuple[int, ...]


class Member:
    """Steps are taken by the fleet: `chunks`, gradients into `adapter.parameters`, `finish_step`."""

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        loss: Loss,
        make_optimizer: Callable[[Sequence[ParameterGroup]], MemberOptimizer],
        order: Order,
        train: Sequence[Unit],
        held_out: Sequence[Unit],
        options: MemberOptions,
    ) -> None:
        self.name, self.adapter, self.loss, self.options = name, adapter, loss, options
        self.optimizer = make_optimizer(adapter.parameters.groups)
        self.held_out = tuple(held_out)
        self.reference: PrecomputedReference | None = None
        self._order, self.train = order, train
        self.step = 0
        self.state: State = "running" if options.total_steps else "finished"
        self.failure: str | None = None
        self.is_torn = False  # a failed step left the optimizer's state between two steps
        self.chunk_tokens = options.chunk_tokens

    def chunks(self) -> list[UnitChunk]:
        """What the next step computes."""
        return self._cut(self.train, self._order.micro_batches(self.step))

    def eval_chunks(self) -> list[UnitChunk]:
        """The evaluation set, units of like length together."""
        order = sorted(range(len(self.held_out)), key=lambda index: self.held_out[index].tokens)
        return self._cut(self.held_out, [order])

    def _cut(self, units: Sequence[Unit], batches: Sequence[Sequence[int]]) -> list[UnitChunk]:
        """By tokens, with as many units in a chunk as the loss needs to be what it is meant to be."""
        found: list[UnitChunk] = []
        for batch in batches:
            lengths = [units[index].tokens for index in batch]
            for part in cut_by_tokens(lengths, self.chunk_tokens, self.loss.least_units):
                indices = tuple(batch[part])
                found.append(UnitChunk(len(found), tuple(units[index] for index in indices), indices))
        return found

    def dropout_key(self, chunk: int) -> str:
        """What its masks are drawn from: the same in a run that was never stopped."""
        return f"{self.options.seed}/{self.step}/{chunk}"

    def finish_step(self, loss: float, totals: Totals, metrics: Mapping[str, float]) -> StepReport | None:
        """Clips and steps. Where a number is not finite the weights stay as they were, and the state is diverged."""
        parameters = self.adapter.parameters
        norm = parameters.clip(self.options.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.diverge(f"step {self.step + 1}: loss {loss:g}, gradient norm {norm:g}")
            return None
        rate = self.options.rate(self.step)
        before = parameters.weights.clone()
        self.optimizer.step(rate)
        self.adapter.after_step(self.step + 1)
        parameters.clear()
        if not parameters.is_finite:
            parameters.weights.copy_(before)
            self.is_torn = True
            self.diverge(f"step {self.step + 1}: the optimizer made weights that are not finite")
            return None
        self.step += 1
        if self.step >= self.options.total_steps:
            self.state = "finished"
        return StepReport(self.step, loss, rate, norm, totals.tokens, dict(metrics))

    def diverge(self, why: str) -> None:
        """It is quarantined: it takes no further step."""
        self.adapter.parameters.clear()
        self.state, self.failure = "diverged", why

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes from step to step, on the CPU."""
        state = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        return _copied(state) | self.adapter_tensors()

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """What of them is exported, without the optimizer, on the CPU."""
        state = {f"adapter.{name}": tensor for name, tensor in self.adapter.tensors().items()}
        return _copied({**state, "weights": self.adapter.parameters.weights})

    def take_adapter(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `adapter_tensors` gave; no step follows. Raises CheckpointInvalid where it is another's."""
        weights = self.adapter.parameters.weights
        try:
            if tensors["weights"].shape != weights.shape:
                raise ValueError(f"{tensors['weights'].numel()} weights, not {weights.numel()}")
            self.adapter.restore(_below("adapter.", tensors))
            weights.copy_(tensors["weights"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointInvalid(f"the checkpoint's tensors are not those of this job ({error})") from error

    def restore(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue after `step` steps. Raises CheckpointInvalid where the tensors are not this member's."""
        self.take_adapter(tensors)
        try:
            self.optimizer.restore(_below("optimizer.", tensors))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointInvalid(f"the checkpoint's tensors are not those of this job ({error})") from error
        self.step = step
        self.state = "running" if step < self.options.total_steps else "finished"


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""What a member of a fleet will hold, by building it in torch's fake mode: its tensors have shapes and no memory.

The very code of the run builds it, so that no method or optimizer has a second description here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loramux_adapters.base.load import LoadedBase
from loramux_trainer.job import TrainConfig
from loramux_trainer.methods.build import Surroundings, build_method
from loramux_trainer.methods.factors import OF_DATA, OF_WEIGHTS
from loramux_trainer.methods.rules import BaseValues
from loramux_trainer.methods.trained import TrainedAdapter
from loramux_trainer.optimizers.build import build_optimizer
from loramux_trainer.optimizers.interface import ParameterGroup
from loramux_trainer.targets import modules_of

_FLOAT = 4
_OF_BITSANDBYTES: Mapping[str, int] = {"adamw_8bit": 1, "paged_adamw": 4, "paged_adamw_8bit": 1}
"""Optimizer -> bytes of one number of its state; its kernels do not run in fake mode."""
_BLOCK, _MAP = 256, 256  # numbers a scale is for, and of an 8-bit state's table


@dataclass(frozen=True)
class MemberBytes:
    """Of one member. `method`: tensors that are kept and not trained, and the state of the method itself."""

    parameters: int  # how many are trained
    weights: int
    gradients: int
    optimizer: int
    method: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.method


def member_bytes(job: TrainConfig, base: LoadedBase, total_steps: int) -> MemberBytes:
    """Of a job on a base, whose weights are not read: see `read_unloaded`.

    Raises JobInvalid and AdapterError where the job cannot be built.
    """
    if job.method == "prompt":  # reads rows of the embedding by their numbers, which fake tensors do not have
        return _measured(job, base, total_steps)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _measured(job, base, total_steps)


def optimizer_bytes(job: TrainConfig, groups: Sequence[ParameterGroup]) -> int:
    """Of the state after a step over `groups`."""
    each = _OF_BITSANDBYTES.get(job.training.optimizer)
    if each is not None:
        return sum(_of_bitsandbytes(group.flat.numel(), each) for group in groups)
    optimizer = build_optimizer(job.training, groups, loraplus_lr_ratio=job.lora.loraplus_lr_ratio)
    return optimizer.state_bytes()


def _of_bitsandbytes(count: int, each: int) -> int:
    """Two moments; in 8 bits with a table and a scale a block."""
    return 2 * (count * each + (0 if each > 1 else (_MAP + -(-count // _BLOCK)) * _FLOAT))


def _measured(job: TrainConfig, base: LoadedBase, total_steps: int) -> MemberBytes:
    shapes = modules_of(job, base.spec)
    values = _ValuesWithoutMemory(base)
    is_pair = job.init in (*OF_WEIGHTS, *OF_DATA) and job.init != "eva"

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        module, rank = base.spec.modules[name], shapes[name].rank
        return torch.empty(rank, module.in_features), torch.empty(module.out_features, rank)

    around = Surroundings(
        base,
        values,
        shapes,
        total_steps,
        tell=lambda _: None,
        pairs=pair if is_pair else None,
        components=(lambda name: pair(name)[0]) if job.init == "eva" else None,
        encode=lambda text: list(range(max(1, len(text)))),
    )
    adapter = TrainedAdapter(build_method(job, around), base.spec, base.device)
    trained = adapter.parameters
    return MemberBytes(
        trained.weights.numel(),
        _nbytes(trained.weights),
        _nbytes(trained.gradients),
        optimizer_bytes(job, trained.groups),
        adapter.constant_bytes + sum(map(_nbytes, adapter.tensors().values())),
    )


class _ValuesWithoutMemory(BaseValues):
    """Values of the right shapes: one number, shown as many."""

    def bias(self, name: str) -> torch.Tensor:
        """See BaseValues."""
        return torch.zeros(()).expand(self._base.spec.modules[name].out_features)

    def weight(self, name: str) -> torch.Tensor:
        """See BaseValues."""
        module = self._base.spec.modules[name]
        shapes: Mapping[str, tuple[int, ...]] = {
            "embedding": (module.in_features, module.out_features),
            "norm": (module.out_features,),
        }
        return torch.zeros(()).expand(shapes.get(module.kind, (module.out_features, module.in_features)))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

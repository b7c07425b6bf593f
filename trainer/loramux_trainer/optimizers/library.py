"""A library's optimizers over a member's buffers: rates by role, and a state that is saved and restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loramux_trainer.errors import CheckpointInvalid
from loramux_trainer.optimizers.interface import ParameterGroup

_OTHER = "the checkpoint's tensors are not those of this job's optimizer"

RATIO = "rate_ratio"
"""Key of a parameter group of torch: its learning rate over the scheduled one."""


def torch_groups(
    groups: Sequence[ParameterGroup], weight_decay: float, loraplus_lr_ratio: float | None
) -> list[dict[str, Any]]:
    """Parameter groups of torch, one a group, in the same order."""
    return [
        {
            "params": [group.flat],
            "weight_decay": 0.0 if group.role == "vector" else weight_decay,
            RATIO: rate_ratio(group, loraplus_lr_ratio),
        }
        for group in groups
    ]


def rate_ratio(group: ParameterGroup, loraplus_lr_ratio: float | None) -> float:
    """LoRA+ (Hayou et al., 2024): B learns faster than A."""
    return loraplus_lr_ratio if loraplus_lr_ratio is not None and group.role == "b" else 1.0


class LibraryOptimizer:
    """One or more torch optimizers that step together. See MemberOptimizer.

    State that is a number (bitsandbytes, pytorch-optimizer) is saved as an int64 tensor.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    @property
    def needs_hessian(self) -> bool:
        """See MemberOptimizer."""
        return False

    def give_hessian(self, estimates: Sequence[torch.Tensor]) -> None:
        """See MemberOptimizer."""
        raise ValueError("this optimizer takes no estimate of a Hessian")

    def step(self, rate: float) -> None:
        """See MemberOptimizer."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group[RATIO]
            self._step(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """See MemberOptimizer."""
        return {name: torch.as_tensor(state[key]).detach().cpu().clone() for name, state, key in self._entries()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See MemberOptimizer."""
        if tensors:
            self._make_state()
        entries = {name: (state, key) for name, state, key in self._entries()}
        if entries.keys() != tensors.keys():
            raise CheckpointInvalid(_OTHER)
        for name, (state, key) in entries.items():
            value = state[key]
            if not isinstance(value, torch.Tensor):
                state[key] = int(tensors[name])
            elif (value.shape, value.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise CheckpointInvalid(_OTHER)
            else:
                value.copy_(tensors[name])

    def _make_state(self) -> None:
        """A step with rate and gradients zero: the library makes its state in its own kind of memory, to be filled."""
        parameters = [
            parameter
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        gradients = [parameter.grad.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad.zero_()
        self.step(0.0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)

    def _entries(self) -> Iterator[tuple[str, Any, str]]:
        """(name, mapping, key) of each part of the state; some libraries count steps by group."""
        for number, optimizer in enumerate(self._optimizers):
            for index, group in enumerate(optimizer.param_groups):
                if "step" in group:
                    yield f"{number}.{index}.step", group, "step"
                for place, parameter in enumerate(group["params"]):
                    state = optimizer.state.get(parameter, {})
                    for key in state:
                        if state[key] is not None:
                            yield f"{number}.{index}.{place}.{key}", state, key

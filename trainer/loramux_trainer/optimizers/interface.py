"""What a member of a fleet and its optimizer know of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import nn

Role = Literal["a", "b", "vector", "embedding", "matrix"]


class ParameterGroup(Protocol):
    """Parameters of one role in one flat buffer. `vector`: gains, biases and norms, which get no weight decay.

    `views` and `gradients` are, by name, views of `flat` and of `flat.grad` in a parameter's own shape. `flat` is
    float32 and contiguous; its gradient is set, and stays the same tensor for as long as the optimizer lives. One view
    a module: Muon makes each view orthogonal for itself, so factors of siblings in one view would be another update.
    """

    @property
    def role(self) -> Role: ...
    @property
    def flat(self) -> nn.Parameter: ...
    @property
    def views(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def gradients(self) -> Mapping[str, torch.Tensor]: ...


class MemberOptimizer(Protocol):
    """The optimizer of one member. It changes parameters and its own state; gradients are the caller's to zero."""

    @property
    def needs_hessian(self) -> bool:
        """Whether the next step needs `give_hessian` before it; never, but of Sophia."""
        ...

    def give_hessian(self, estimates: Sequence[torch.Tensor]) -> None:
        """Estimates of the Hessian's diagonal for the next step, one a group in the shape of its `flat`.

        See `optimizers.hessian`. Raises ValueError of an optimizer that takes none, and for shapes that are not the
        groups'.
        """
        ...

    def step(self, rate: float) -> None:
        """One step with the scheduled learning rate, from the gradients as they are."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state on the CPU, for `restore`."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue bit for bit from `tensors`. Raises CheckpointInvalid when they are not of this optimizer."""
        ...

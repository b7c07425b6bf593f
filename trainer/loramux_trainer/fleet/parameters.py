"""A member's trained numbers: one flat float32 buffer and one of gradients, with views in their shapes.

So clipping is one norm, an optimizer step one fused call, a checkpoint one tensor and the check for finite numbers one
pass. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Role = Literal["a", "b", "vector", "embedding", "matrix"]
"""What an optimizer makes of a tensor: A and B of a low rank, vectors (gains, biases, norms: no weight decay), rows of
tokens, and any other matrix."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Parameter:
    """One trained tensor as a method asks for it."""

    name: str
    role: Role
    initial: torch.Tensor


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """The tensors of one role, one behind the other. `flat.grad` is set and stays the same tensor."""

    role: Role
    flat: nn.Parameter  # [n] float32
    views: Mapping[str, torch.Tensor]  # name -> view of `flat`
    gradients: Mapping[str, torch.Tensor]  # name -> view of `flat.grad`


class FlatParameters:
    """All trained tensors of a member."""

    def __init__(self, parameters: Sequence[Parameter], device: torch.device) -> None:
        """Copies the initial values. Raises ValueError for a name that is given twice."""
        names = [parameter.name for parameter in parameters]
        if len(set(names)) != len(names):
            raise ValueError("a trained tensor is named twice")
        total = sum(parameter.initial.numel() for parameter in parameters)
        self.weights = torch.empty(total, dtype=torch.float32, device=device)
        self.gradients = torch.zeros(total, dtype=torch.float32, device=device)
        groups: list[ParameterGroup] = []
        start = 0
        for role in ROLES:
            own = [parameter for parameter in parameters if parameter.role == role]
            if own:
                groups.append(self._group(role, own, start))
                start += groups[-1].flat.numel()
        self.groups = tuple(groups)
        self.views = {name: view for group in self.groups for name, view in group.views.items()}
        self._gradients = {name: view for group in self.groups for name, view in group.gradients.items()}

    def _group(self, role: Role, parameters: Sequence[Parameter], start: int) -> ParameterGroup:
        views, gradients, at = {}, {}, start
        for parameter in parameters:
            stop = at + parameter.initial.numel()
            views[parameter.name] = self.weights[at:stop].view(parameter.initial.shape)
            views[parameter.name].copy_(parameter.initial)
            gradients[parameter.name] = self.gradients[at:stop].view(parameter.initial.shape)
            at = stop
        flat = nn.Parameter(self.weights[start:at])
        flat.grad = self.gradients[start:at]
        return ParameterGroup(role, flat, views, gradients)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Name -> the tensor as a leaf of a graph, whose gradients are added to the flat buffer."""
        found = {}
        for name, view in self.views.items():
            leaf = view.detach().requires_grad_()
            leaf.grad = self._gradients[name]
            found[name] = leaf
        return found

    def shaped(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of another buffer of the same layout."""
        start = self.weights.data_ptr()
        places = {name: (view.data_ptr() - start) // 4 for name, view in self.views.items()}
        return {name: flat[at : at + self.views[name].numel()].view_as(self.views[name]) for name, at in places.items()}

    def clip(self, most: float | None) -> float:
        """Scales the gradients to a norm of at most `most`, as torch does; returns the norm they had."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if most is not None and math.isfinite(norm) and norm > most:
            self.gradients.mul_(most / (norm + 1e-6))
        return norm

    def clear(self) -> None:
        """Gradients to zero."""
        self.gradients.zero_()

    @property
    def is_finite(self) -> bool:
        """Whether all weights are."""
        return math.isfinite(float(self.weights.abs().max())) if self.weights.numel() else True

"""A member's parts in one optimizer step: what its trained tensors come to at every module, with gradients.

Parts are made from trained tensors by the very functions that a server reads files with, once a step. The model's nodes
write gradients of these *derived* tensors; at the end of the step they run back to the trained ones in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from loramux_adapters.parts.part import Part

P = TypeVar("P", bound=Part)
B = TypeVar("B")


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor that the model's nodes read, and where its gradient is added up; None where nothing asks for one."""

    value: torch.Tensor
    grad: torch.Tensor | None

    def as_variable(self) -> torch.Tensor:
        """It as a leaf of autograd's graph, which adds to the same gradient."""
        variable = self.value.detach()
        if self.grad is not None:
            variable.requires_grad_()
            variable.grad = self.grad
        return variable


class StepParts:
    """The parts of one member, by module, for one step."""

    def __init__(self, modules: Mapping[str, tuple[Part, ...]], penalty: torch.Tensor | None = None) -> None:
        """`modules`: their tensors are trained leaves, derived from such with a graph, or constants. `penalty`: what
        comes to the loss besides."""
        self.modules, self._penalty = modules, penalty
        self._leaves: dict[int, tuple[torch.Tensor, Leaf]] = {}
        self._bound: dict[str, object] = {}

    def get(self, module: str, kind: type[P]) -> P | None:
        """The part of that kind at a module."""
        return next((part for part in self.modules.get(module, ()) if isinstance(part, kind)), None)

    def bound(self, site: str, bind: Callable[[StepParts], B]) -> B:
        """What a site makes of the parts, once a step."""
        if site not in self._bound:
            # The first to ask may be a forward without gradients, whose derived tensors all others read.
            with torch.enable_grad():
                self._bound[site] = bind(self)
        return self._bound[site]  # type: ignore[return-value]

    def leaf(self, tensor: torch.Tensor) -> Leaf:
        """The leaf of one tensor of a part, or of one that was derived from it."""
        known = self._leaves.get(id(tensor))
        if known is None:
            if not tensor.requires_grad:
                leaf = Leaf(tensor.detach(), None)
            elif tensor.is_leaf:
                leaf = Leaf(tensor.detach(), tensor.grad)
            else:
                leaf = Leaf(tensor.detach(), torch.zeros_like(tensor))
            known = self._leaves[id(tensor)] = (tensor, leaf)  # the tensor is held, so that its id stays its own
        return known[1]

    def backward(self) -> float:
        """Runs the gradients of derived tensors back to the trained ones; once, at the end of a step.

        Returns what comes to the loss besides.
        """
        ends = [(t, leaf.grad) for t, leaf in self._leaves.values() if t.requires_grad and not t.is_leaf]
        if self._penalty is not None:
            ends.append((self._penalty, torch.ones_like(self._penalty)))
        if ends:
            torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])
        return 0.0 if self._penalty is None else float(self._penalty.detach())

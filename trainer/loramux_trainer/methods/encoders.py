"""Small networks that make the embeddings of virtual tokens while training: PEFT's prompt encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

from loramux_trainer.methods.method import Start


class Network(Protocol):
    """A function of trained tensors, which are not a module's: they lie in the member's buffer."""

    def starts(self, source: torch.Generator) -> dict[str, Start]:
        """How its tensors begin."""
        ...

    def __call__(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What it gives for x with these tensors."""
        ...


@dataclass(frozen=True)
class Mlp:
    """Linear layers with an activation between them, begun as torch begins them."""

    widths: Sequence[int]
    activation: Callable[[torch.Tensor], torch.Tensor]

    def starts(self, source: torch.Generator) -> dict[str, Start]:
        """See Network."""
        found = {}
        for index, (wide, out) in enumerate(pairwise(self.widths)):
            found[f"{index}.weight"] = Start(_uniform((out, wide), wide, source), "matrix")
            found[f"{index}.bias"] = Start(_uniform((out,), wide, source), "vector")
        return found

    def __call__(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """x [n, widths[0]] -> [n, widths[-1]]."""
        last = len(self.widths) - 2
        for index in range(last + 1):
            x = F.linear(x, tensors[f"{index}.weight"], tensors[f"{index}.bias"])
            x = x if index == last else self.activation(x)
        return x


@dataclass(frozen=True)
class Lstm:
    """A bidirectional LSTM and two linear layers behind it, as PEFT's prompt encoder."""

    width: int
    hidden: int
    layers: int = 2

    @property
    def _head(self) -> Mlp:
        return Mlp([2 * self.hidden, 2 * self.hidden, self.width], F.relu)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            wide = 2 * self.hidden if layer else self.width
            for side in ("", "_reverse"):
                shapes[f"weight_ih_l{layer}{side}"] = (4 * self.hidden, wide)
                shapes[f"weight_hh_l{layer}{side}"] = (4 * self.hidden, self.hidden)
                shapes |= {f"bias_{kind}_l{layer}{side}": (4 * self.hidden,) for kind in ("ih", "hh")}
        return shapes

    def starts(self, source: torch.Generator) -> dict[str, Start]:
        """See Network."""
        own = {
            name: Start(_uniform(shape, self.hidden, source), "matrix" if len(shape) > 1 else "vector")
            for name, shape in self._shapes.items()
        }
        return own | {f"head.{name}": start for name, start in self._head.starts(source).items()}

    def __call__(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """x [n, width] -> [n, width]."""
        zeros = x.new_zeros(2 * self.layers, 1, self.hidden)
        flat = [tensors[name] for name in self._shapes]
        y = torch.lstm(x[None], (zeros, zeros), flat, True, self.layers, 0.0, False, True, True)[0][0]
        return self._head(y, {name.removeprefix("head."): t for name, t in tensors.items() if name.startswith("head.")})


def _uniform(shape: tuple[int, ...], fan: int, source: torch.Generator) -> torch.Tensor:
    bound = 1.0 / math.sqrt(fan)
    return torch.empty(shape).uniform_(-bound, bound, generator=source)

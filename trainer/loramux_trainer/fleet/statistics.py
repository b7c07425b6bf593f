"""What passes the linear maps of the bare base for some sequences: moments of inputs, gradients of frozen weights.

Initializations and GaLore ask for it. Nothing is trained meanwhile, and no weight is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from loramux_trainer.fleet.linear import LinearGroup
from loramux_trainer.fleet.model import FleetModel, MemberRows

B = TypeVar("B")
Batches = Callable[[], Iterable[Sequence[MemberRows]]]
"""The micro-batches, anew at every call."""


@dataclass(eq=False)
class InputMoments:
    """Of what one group of siblings reads: sums over `count` tokens, and over batches of inputs scaled to 1."""

    total: torch.Tensor  # [in]
    squares: torch.Tensor  # [in, in]
    scaled: torch.Tensor  # [in, in], of x / max(x), as CorDA takes it
    count: int = 0
    batches: int = 0

    def inputs(self, x: torch.Tensor) -> None:
        """See Observer."""
        x = x.detach().float()
        self.total += x.sum(0)
        self.squares.addmm_(x.T, x)
        largest = x.max().abs()
        self.scaled.addmm_(x.T, x, alpha=1.0 / float(largest * largest))
        self.count += len(x)
        self.batches += 1

    def gradients(self, x: torch.Tensor, of_y: Sequence[torch.Tensor]) -> None:
        """See Observer."""


@dataclass(eq=False)
class WeightGradients:
    """Of the frozen weights of one group: [out, in] for each map that is asked for."""

    sums: list[torch.Tensor | None]

    def inputs(self, x: torch.Tensor) -> None:
        """See Observer."""

    def gradients(self, x: torch.Tensor, of_y: Sequence[torch.Tensor]) -> None:
        """See Observer."""
        for total, gradient in zip(self.sums, of_y, strict=True):
            if total is not None:
                total.addmm_(gradient.float().T, x.float())


@torch.no_grad()
def input_moments(model: FleetModel, modules: Sequence[str], batches: Batches) -> dict[str, InputMoments]:
    """Of each module; siblings share theirs."""
    found: dict[str, InputMoments] = {}
    for group in _groups_with(model, modules):
        wide, device = group.frozen.in_features, model.base.device
        square = torch.zeros(2, wide, wide, device=device)
        group.observer = moments = InputMoments(torch.zeros(wide, device=device), square[0], square[1])
        found |= {name: moments for name in group.names if name in modules}
    try:
        for members in batches():
            with model.running(members):
                pass
    finally:
        _forget(model)
    return found


def weight_gradients(
    model: FleetModel,
    modules: Sequence[str],
    batches: Callable[[], Iterable[B]],
    backward: Callable[[B], None],
    *,
    most_bytes: int = 1 << 30,
) -> Mapping[str, torch.Tensor]:
    """Gradient [out, in] of each module's frozen weight, summed over the batches; on the CPU.

    `backward` runs one batch. Where all gradients take more than `most_bytes` on the device there are several passes.
    """
    found: dict[str, torch.Tensor] = {}
    for part in _parts(_groups_with(model, modules), modules, most_bytes):
        observers: list[tuple[LinearGroup, WeightGradients]] = []
        for group in part:
            shapes = zip(group.names, group.widths, strict=True)
            device, wide = model.base.device, group.frozen.in_features
            sums = [torch.zeros(out, wide, device=device) if name in modules else None for name, out in shapes]
            group.observer = observer = WeightGradients(sums)
            observers.append((group, observer))
        try:
            for members in batches():
                backward(members)
        finally:
            _forget(model)
        for group, observer in observers:
            for name, total in zip(group.names, observer.sums, strict=True):
                if total is not None:
                    found[name] = total.cpu()
    return found


def _groups_with(model: FleetModel, modules: Sequence[str]) -> list[LinearGroup]:
    return [group for group in model.groups if any(name in modules for name in group.names)]


def _parts(groups: Sequence[LinearGroup], modules: Sequence[str], most: int) -> list[list[LinearGroup]]:
    parts: list[list[LinearGroup]] = []
    room = 0
    for group in groups:
        own = [width for name, width in zip(group.names, group.widths, strict=True) if name in modules]
        size = 4 * group.frozen.in_features * sum(own)
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(group)
        room -= size
    return parts


def _forget(model: FleetModel) -> None:
    for group in model.groups:
        group.observer = None

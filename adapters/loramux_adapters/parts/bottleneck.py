"""Bottleneck: h + Up(act(Down(h))) on the output of a layer's attention or MLP (Houlsby et al., 2019; Pfeiffer et al.,
2020), or beside it, read from the residual stream (He et al., 2021).

It is nonlinear, so it is in no weight. Every segment is computed for its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from loramux_adapters.kernels import invariant
from loramux_adapters.parts.part import Kind, Part, PartCost, Share, SiteParts, finite
from loramux_adapters.parts.site import Product, Site, StepRows

Source = Literal["output", "sum", "residual"]
"""The sub-layer's output, what it is added to (the residual stream before it), or both together."""

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

_EPS = 1e-5  # of the adapter's own norms: torch's default
# In deterministic steps: a tile's elements are whole turns of a vector loop, whose scalar tail would give other bits.
_WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class BottleneckForm:
    """What stands where.

    The new output is x -> Up(act(Down(norm_before(x)))) with norm_after behind it, plus the shortcut.
    """

    activation: str  # a key of ACTIVATIONS
    reads: Source = "output"
    shortcut: Literal["output", "sum"] = "output"
    shortcut_in_norm: bool = False  # whether norm_after is over the shortcut too
    keeps_residual: bool = True  # whether the residual stream is added to all this, as to any output


@dataclass(frozen=True, eq=False)
class Bottleneck(Part):
    """One of them; float32, the scale folded into `up` and `up_bias`."""

    form: BottleneckForm
    down: torch.Tensor  # [k, width]
    down_bias: torch.Tensor  # [k]
    up: torch.Tensor  # [width, k]
    up_bias: torch.Tensor  # [width]
    norm_before: torch.Tensor | None = None  # [2, width]: weight and bias
    norm_after: torch.Tensor | None = None  # alike


@dataclass(frozen=True, eq=False)
class BoundBottleneck:
    """A bottleneck on the device, of tensors that may have gradients."""

    form: BottleneckForm
    down: Product
    up: Product
    norm_before: torch.Tensor | None
    norm_after: torch.Tensor | None
    is_invariant: bool = False

    def output(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The sub-layer's output y [T, width] and what it will be added to -> its new output."""
        return invariant.in_tiles(self._rows, y, residual) if self.is_invariant else self._rows(y, residual)

    def _rows(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        form = self.form
        sources = {"output": y, "residual": residual}
        if "sum" in (form.reads, form.shortcut):
            sources["sum"] = y + residual
        x, shortcut = sources[form.reads], sources[form.shortcut]
        change = self.up(ACTIVATIONS[form.activation](self.down(_norm(x, self.norm_before))))
        if form.shortcut_in_norm:
            y = _norm(change + shortcut, self.norm_after)
        else:
            y = _norm(change, self.norm_after) + shortcut
        return y if form.keeps_residual else y - residual


def _norm(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm[0], norm[1], _EPS)


class Bottlenecks(SiteParts[Bottleneck]):
    """At a sub-layer, whose input is the residual stream."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.bound: Mapping[int, BoundBottleneck] = {}  # by slot
        self._written: dict[int, BoundBottleneck] = {}

    def cost(self, part: Bottleneck) -> PartCost:
        """Bytes of all tensors, padded."""
        width, k = part.up.shape
        elements = sum(tensor.numel() for tensor in part.tensors) + self._padding(k) * (2 * width + 1)
        return PartCost(nbytes=elements * self.site.dtype.itemsize)

    def prepare(self, member: int, part: Bottleneck) -> tuple[torch.Tensor, ...]:
        """Those of the part in order; zeros behind the last unit change nothing."""
        missing = self._padding(len(part.down))
        padded = [
            F.pad(part.down, (0, 0, 0, missing)),
            F.pad(part.down_bias, (0, missing)),
            F.pad(part.up, (0, missing)),
            *part.tensors[3:],
        ]
        return tuple(finite(self.site.members[member], tensor.to(self.site.dtype)) for tensor in padded)

    def write(
        self,
        slot: int,
        member: int,
        part: Bottleneck,
        prepared: Sequence[torch.Tensor],
        rank_rows: tuple[int, int] | None,
    ) -> None:
        """See SiteParts."""
        down, down_bias, up, up_bias, *norms = (t.to(self.site.device, non_blocking=True) for t in prepared)
        self._written[slot] = BoundBottleneck(
            part.form,
            self.site.multiply(down, down_bias),
            self.site.multiply(up, up_bias),
            None if part.norm_before is None else norms.pop(0),
            None if part.norm_after is None else norms.pop(0),
            self.site.is_invariant,
        )

    def bind(self, slot: int) -> None:
        """See SiteParts."""
        if slot in self._written:
            self.bound = {**self.bound, slot: self._written[slot]}
            del self._written[slot]

    def unbind(self, slot: int) -> None:
        """See SiteParts."""
        self._written.pop(slot, None)
        self.bound = {key: bound for key, bound in self.bound.items() if key != slot}

    def has(self, slot: int) -> bool:
        """See SiteParts."""
        return slot in self.bound

    def after(self, y: torch.Tensor, inputs: Sequence[torch.Tensor], step: StepRows) -> None:
        """Puts the new output where the old one was."""
        for start, stop, slot in step.segments:
            if slot in self.bound:
                y[start:stop] = self.bound[slot].output(y[start:stop], inputs[0][start:stop])

    def _padding(self, k: int) -> int:
        return -k % _WIDTH_MULTIPLE if self.site.is_invariant else 0


def _fold(_weight: torch.Tensor, _bias: torch.Tensor, _part: Bottleneck) -> None:
    """Nothing of it is in a weight."""


def _combine(shares: Sequence[Share[Bottleneck]]) -> Bottleneck | None:
    """Units add, where each adds to one and the same output."""
    first = shares[0].part
    form = first.form
    adds = form.shortcut == "output" and not form.shortcut_in_norm and form.keeps_residual
    if not adds or any(
        s.part.form != form or s.part.norm_before is not None or s.part.norm_after is not None for s in shares
    ):
        return None
    return Bottleneck(
        form,
        torch.cat([share.part.down for share in shares]),
        torch.cat([share.part.down_bias for share in shares]),
        torch.cat([share.weight * share.part.up for share in shares], dim=1),
        torch.stack([share.weight * share.part.up_bias for share in shares]).sum(0),
    )


KIND = Kind(
    Bottleneck,
    {"sublayer": Bottlenecks},
    _fold,
    _combine,
    unfoldable="a bottleneck is nonlinear, so it is in no weight",
)

"""Gradients through the arithmetic that serves: the frozen product, and the low-rank kernels beside it.

Forward calls exactly what a server calls. Backward is plain products in float32 of what the forward has seen; the
frozen weight and the pools get their gradients from nowhere else. Knows no module and no adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from loramux_adapters.base.frozen import FrozenLinear
from loramux_adapters.kernels.protocol import Kernels, LowRankPools, SlotSegment
from loramux_adapters.parts.rank_rows import RankRows


class FrozenProduct(torch.autograd.Function):
    """x [T, in] -> W x + b [T, out]; nothing of x is kept, as the weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
        """The frozen product."""
        ctx.frozen = frozen
        return frozen.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """gradient [T, out] -> [T, in]."""
        return ctx.frozen.backward(gradient), None


class LowRankRows:
    """Which rows of x use which rank rows of one pool, prepared for the kernels."""

    def __init__(
        self, rows: int, segments: Sequence[SlotSegment], rank_rows: RankRows, kernels: Kernels, device: torch.device
    ) -> None:
        """`segments` are not empty, sorted and disjoint."""
        self.rank_rows, self._kernels = rank_rows, kernels
        self.segments = [segment for segment in segments if segment.slot in rank_rows.ranges]
        self._prepared = kernels.prepare(rows, segments, device)

    def add(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """y [T, out] += B A x for each row's own rank rows: a [C, in], b [C, out]."""
        self._kernels.add(y, x, LowRankPools(a[None], [b], [(0, b.shape[1])], [self.rank_rows]), self._prepared)


class AdaptedProduct(torch.autograd.Function):
    """W x + b + B A z: x [T, in] for the frozen map, z [T, in] (x, or what dropout left of it) for the low rank.

    a is [C, in] and b [C, out], float32, the scale folded in. They are rounded to the dtype of x, as a server's slots
    hold them, and their gradients pass the rounding by.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        z: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        frozen: FrozenLinear,
        rows: LowRankRows,
    ) -> torch.Tensor:
        """[T, out]"""
        y = frozen.forward(x)
        a, b = a.to(x.dtype).contiguous(), b.to(x.dtype).contiguous()
        rows.add(y, z, a, b)
        ctx.save_for_backward(z, a, b)
        ctx.frozen, ctx.rows = frozen, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x, z, a and b; those of a and b are float32."""
        z, a, b = ctx.saved_tensors
        of_x = ctx.frozen.backward(gradient) if ctx.needs_input_grad[0] else None
        of_z = torch.zeros_like(z)
        of_a, of_b = (torch.zeros(pool.shape, dtype=torch.float32, device=pool.device) for pool in (a, b))
        for start, stop, slot in ctx.rows.segments:
            first, count = ctx.rows.rank_rows.ranges[slot]
            own = slice(first, first + count)
            rows, outputs = z[start:stop].float(), gradient[start:stop].float()
            shrunk, of_shrunk = rows @ a[own].float().T, outputs @ b[own].float().T  # [rows, r]
            of_z[start:stop] = (of_shrunk @ a[own].float()).to(z.dtype)
            of_a[own] += of_shrunk.T @ rows
            of_b[own] += shrunk.T @ outputs
        return of_x, of_z, of_a, of_b, None, None


def multiply_frozen(x: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
    """See FrozenProduct."""
    return cast(torch.Tensor, FrozenProduct.apply(x, frozen))  # type: ignore[no-untyped-call]


def multiply_adapted(
    x: torch.Tensor, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, frozen: FrozenLinear, rows: LowRankRows
) -> torch.Tensor:
    """See AdaptedProduct."""
    return cast(torch.Tensor, AdaptedProduct.apply(x, z, a, b, frozen, rows))  # type: ignore[no-untyped-call]

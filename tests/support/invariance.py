"""Checks that a row's product depends on that row alone; also run in processes with other numbers of threads."""

from __future__ import annotations

import torch

from loramux_adapters.kernels import invariant
from loramux_adapters.kernels.protocol import LowRankPools, SlotSegment
from loramux_adapters.kernels.reference import ReferenceKernels
from loramux_adapters.parts.rank_rows import RankRows

SHAPES = ((128, 192), (384, 128), (256, 1), (8, 320), (768, 2304))
COUNTS = (1, 2, 7, 8, 31, 32, 33, 70)


def check_linear(dtype: torch.dtype) -> None:
    """A row's result is the same bits at every place and among any neighbors."""
    for in_features, out_features in SHAPES:
        generator = torch.Generator().manual_seed(in_features)
        weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
        bias = torch.randn(out_features, generator=generator).to(dtype)
        row = torch.randn(1, in_features, generator=generator).to(dtype)
        alone = invariant.linear(row, weight, bias)
        for count in COUNTS:
            for place in {0, count // 2, count - 1}:
                x = torch.randn(count, in_features, generator=generator).to(dtype) * 100
                x[place] = row[0]
                found = invariant.linear(x, weight, bias)
                assert found.shape == (count, out_features)
                assert torch.equal(found[place], alone[0]), (in_features, out_features, count, place)


def check_reference(dtype: torch.dtype) -> None:
    """The same for the reference kernel: alone against the middle of a batch of three adapters."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(1, 48, 256, generator=generator).to(dtype), torch.randn(48, 192, generator=generator).to(dtype)
    x = torch.randn(50, 256, generator=generator).to(dtype)
    y = torch.randn(50, 192, generator=generator).to(dtype)
    kernels, cpu = ReferenceKernels(), torch.device("cpu")
    pools = LowRankPools(a, [b], [(0, 192)], [RankRows({0: (0, 16), 1: (16, 16), 2: (32, 16)}, 48, cpu)])
    segments = [SlotSegment(0, 11, 0), SlotSegment(11, 41, 1), SlotSegment(41, 50, 2)]
    together = y.clone()
    kernels.add(together, x, pools, kernels.prepare(50, segments, cpu))
    for start, stop, slot in segments:
        for row in range(start, stop):
            alone = y[row : row + 1].clone()
            kernels.add(alone, x[row : row + 1], pools, kernels.prepare(1, [SlotSegment(0, 1, slot)], cpu))
            assert torch.equal(alone[0], together[row]), row


def main() -> None:
    """Every check in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        check_linear(dtype)
        check_reference(dtype)

"""Products in which a row's result depends on that row alone, bit for bit.

Libraries choose another blocking for another number of rows: on one CPU float32 differed at 8 rows, on another from 40
rows on with two threads. So rows are always multiplied in tiles of one fixed shape; within it, a row's place and its
neighbors do not matter (measured for float32 and bfloat16; a test guards it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ROW_TILE = 32


def in_tiles(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`compute` of inputs [T, ...] by tiles of ROW_TILE rows, the last one padded -> [T, ...]."""
    rows = inputs[0].shape[0]
    padded = [F.pad(x, (0, 0, 0, -rows % ROW_TILE)) for x in inputs]
    tiles = [compute(*tile) for tile in zip(*(torch.split(x, ROW_TILE) for x in padded), strict=True)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] @ weight[out, in].T + bias -> [T, out]."""
    return in_tiles(lambda tile: F.linear(tile, weight, bias), x)

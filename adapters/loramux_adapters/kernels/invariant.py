"""Products in which a row's result depends on that row alone, bit for bit.

Libraries choose another blocking for another number of rows: on one CPU float32 differed at 8 rows, on another from 40
rows on with two threads. So rows are always multiplied in tiles of one fixed shape; within it, a row's place and its
neighbors do not matter (measured for float32 and bfloat16; a test guards it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROW_TILE = 32


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] @ weight[out, in].T + bias -> [T, out]."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % ROW_TILE))
    tiles = [F.linear(padded[start : start + ROW_TILE], weight, bias) for start in range(0, padded.shape[0], ROW_TILE)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]

"""Taking some rows of a batch out and putting them back; all of them costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of `tensor` [n, ...], given in rising order. All of them are `tensor` itself: do not write to it."""
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.int64, device=tensor.device))


def put_rows(tensor: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Write `values` [len(rows), ...] to rows of `tensor` [n, ...], given in rising order."""
    if len(rows) == tensor.shape[0]:
        tensor.copy_(values)
    else:
        tensor.index_copy_(0, torch.tensor(rows, dtype=torch.int64, device=tensor.device), values)

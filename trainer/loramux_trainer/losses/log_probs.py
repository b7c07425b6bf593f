"""Arithmetic that the losses share. Shapes: a chunk of answers is [answers]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def answer_sums(rows: Sequence[Tensor], count: int) -> Tensor:
    """Log-probability of each whole answer [count]. Raises ValueError where there is another number of rows."""
    check_rows(rows, count)
    return torch.stack([row.sum() for row in rows])


def check_rows(rows: Sequence[Tensor], count: int) -> None:
    """Raises ValueError where there is another number of rows."""
    if len(rows) != count:
        raise ValueError(f"{count} rows of log-probabilities are needed, not {len(rows)}")


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, brought from the device together."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))

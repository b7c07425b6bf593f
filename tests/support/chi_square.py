"""Pearson's chi-square test of drawn counts against expected probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Chance of counts at least this far off, were they drawn from `probabilities`; both [cells].

    Cells that expect fewer than five draws are taken together, and left out if that is still too few.
    """
    observed = counts.double()
    expected = probabilities.double() / probabilities.double().sum() * observed.sum()
    rare = expected < 5
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    if expected.numel() < 2:
        raise ValueError("fewer than two cells with enough expected draws")
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((expected.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))

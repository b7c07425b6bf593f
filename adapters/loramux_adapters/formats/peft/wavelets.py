"""Daubechies' orthogonal wavelets: their filters, and one step of the inverse transform."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch


@functools.cache
def daubechies(moments: int) -> torch.Tensor:
    """The low-pass filter [2 * moments] of reconstruction, float64, whose phase is least and sum the root of 2.

    The factor (1 + z)^m of its polynomial is known; the rest is the factor of sum_k C(m - 1 + k, k) y^k, where
    y = (2 - z - 1 / z) / 4, with the zeros inside the unit circle (Daubechies, Ten Lectures on Wavelets, 1992, 6.1).
    """
    in_y = [math.comb(moments - 1 + power, power) for power in range(moments)]
    zeros = [-1.0 + 0j] * moments
    for y in np.roots(in_y[::-1]):
        half = 1 - 2 * y  # (z + 1 / z) / 2
        root = np.sqrt(half * half - 1 + 0j)
        zeros.append(min(half + root, half - root, key=abs))
    filter_ = np.real(np.poly(zeros))
    return torch.from_numpy(filter_ * (math.sqrt(2) / filter_.sum()))


def synthesize(coefficients: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """One step along the first axis: [2 n, columns] of low-pass and then high-pass coefficients ->
    [2 n + 2 - len(low), columns], without what the filter leaves at both ends.
    """
    taps, half = len(low), len(coefficients) // 2
    high = low.flip(0) * torch.tensor([1.0, -1.0], device=low.device).repeat(taps // 2)
    whole = torch.zeros(2 * half + taps - 2, coefficients.shape[1], device=coefficients.device)
    for tap in range(taps):
        whole[tap : tap + 2 * half : 2] += low[tap] * coefficients[:half] + high[tap] * coefficients[half:]
    return whole[taps - 2 : len(whole) - taps + 2]

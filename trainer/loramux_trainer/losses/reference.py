"""The frozen base's log-probabilities of answers, computed once before training. Cheaper than in each step from the
second epoch on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PrecomputedReference:
    """One sum [1] per row of each unit of a data set, by the unit's index: what a loss of whole answers needs."""

    def __init__(self, rows: Sequence[int]) -> None:
        """`rows`: how many rows each unit has."""
        self._starts = torch.tensor([0, *rows]).cumsum(0).tolist()
        self._sums = torch.full((self._starts[-1],), torch.nan, dtype=torch.float32)

    def put(self, unit: int, reference: Sequence[Tensor]) -> None:
        """Keep the sums of a unit's rows. Raises ValueError where there is another number of rows, or a NaN."""
        start, end = self._starts[unit], self._starts[unit + 1]
        if len(reference) != end - start:
            raise ValueError(f"unit {unit} has {end - start} rows, not {len(reference)}")
        sums = torch.stack([row.detach().float().sum() for row in reference]).cpu()
        if sums.isnan().any():
            raise ValueError(f"the base's log-probabilities of unit {unit} are not finite")
        self._sums[start:end] = sums

    def of(self, units: Sequence[int], device: torch.device) -> list[Tensor]:
        """`reference` of a chunk of units: a [1] for each row, in the order of a loss's rows."""
        rows = [row for unit in units for row in range(self._starts[unit], self._starts[unit + 1])]
        return list(self._sums[torch.tensor(rows)].to(device)[:, None])

"""Which adapter has which slot, as plain data: it is recorded, compared and sent to other processes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RankRanges = Mapping[str, tuple[int, int]]
"""Linear module name -> (first rank row, number of rows)."""


@dataclass(frozen=True)
class Binding:
    """From the next step on, rows of `slot` are rows of the adapter `digest`."""

    slot: int
    digest: str
    rank_ranges: RankRanges

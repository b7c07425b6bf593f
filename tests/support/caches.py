"""What the registry says to the caches of adapters, recorded."""

from __future__ import annotations

from loramux_adapters.residency.tiers import Weights
from loramux_adapters.store.records import DesiredState


class Caches:
    """Records its calls."""

    def __init__(self) -> None:
        self.evicted: list[str] = []
        self.offered: list[str] = []
        self.desired: list[DesiredState] = []
        self.retries: list[str | None] = []

    def offer(self, weights: Weights) -> None:
        self.offered.append(weights.spec.digest)

    def evict(self, digest: str) -> None:
        assert self.desired
        assert digest not in self.desired[-1].pinned | self.desired[-1].merged  # or it would come back
        self.evicted.append(digest)

    def reconcile(self, desired: DesiredState, retry: str | None = None) -> None:
        self.desired.append(desired)
        self.retries.append(retry)


def desired(pinned: str = "", merged: str = "") -> DesiredState:
    return DesiredState(frozenset({pinned} - {""}), frozenset({merged} - {""}))

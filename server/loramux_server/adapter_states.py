"""Where adapters are, and what is asked of all tiers at once: pool, host memory, merged weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.pool import AdapterPool
from loramux_adapters.residency.tiers import Weights
from loramux_adapters.store.records import DesiredState
from loramux_adapters.weights import AdapterWeights
from loramux_server.adapter_loader import LendingLoader
from loramux_server.api.ports import AdapterState
from loramux_server.model.merged_weights import MergedWeightsCache


class AdapterStateView:
    """Implements `api.ports.AdapterStates` and `publishing.AdapterCaches`."""

    def __init__(
        self,
        pool: AdapterPool[AdapterWeights],
        host: HostCache[AdapterWeights],
        merged_weights: MergedWeightsCache,
        stored: LendingLoader[AdapterWeights],
    ) -> None:
        self._pool, self._host, self._merged_weights, self._stored = pool, host, merged_weights, stored

    def state(self, digest: str) -> AdapterState:
        """Where the version is at this moment."""
        view, dense = self._pool.residency(digest), self._merged_weights.state(digest)
        return AdapterState(
            view.tier, view.slot, view.leases, dense.state, dense.reason, view.host_bytes, merged_replay=dense.replay
        )

    def reconcile(self, desired: DesiredState, retry: str | None = None) -> None:
        """Keep what is pinned on the device and have merged weights of what is to be merged; nothing else."""
        self._pool.pin(desired.pinned, retry)
        self._merged_weights.reconcile(desired.merged, retry)

    def offer(self, weights: Weights) -> None:
        """Keep them in host memory, as if they had been loaded."""
        self._host.offer(weights.spec.digest, cast(AdapterWeights, weights))  # the registry knows no more of them

    def lend(self, weights: Weights) -> AbstractContextManager[None]:
        """Let them be loaded before they are published."""
        return self._stored.lend(cast(AdapterWeights, weights))

    def evict(self, digest: str) -> None:
        """Free its slot once the last lease is back, its host bytes and its merged weights."""
        self._merged_weights.evict(digest)
        self._pool.discard(digest)

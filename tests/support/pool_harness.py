"""An AdapterPool with a fake device and a loader that works when it is told to; adapters are their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

from loramux_adapters.binding import RankRanges
from loramux_adapters.residency.frequency import Frequency
from loramux_adapters.residency.host import HostCache
from loramux_adapters.residency.pool import AdapterPool, Lease
from loramux_adapters.residency.slots import SlotTable
from loramux_adapters.residency.tiers import CopyDone
from loramux_adapters.spec import AdapterSpec


@dataclass(frozen=True)
class FakeWeights:
    """An adapter of one rank on one module: `8-a` has rank 8."""

    spec: AdapterSpec
    nbytes: int = 10


class Device:
    """Accepts everything at once."""

    extra_bytes = 0  # that each adapter takes beside its rank rows

    def cost(self, weights: FakeWeights) -> tuple[Mapping[str, int], int]:
        return weights.spec.ranks, self.extra_bytes

    def stage(self, slot: int, weights: FakeWeights, rank_ranges: RankRanges, done: CopyDone) -> None:
        done(None)


class Later(Executor):
    """Does its work when asked to."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.work.append(lambda: fn(*args, **kwargs))
        return Future()

    def do_all(self) -> None:
        while self.work:
            self.work.pop(0)()


class PoolHarness:
    """A pool of `capacity` rank rows and what is around it."""

    def __init__(self, capacity: int = 32, slots: int = 8, frequency: Frequency | None = None) -> None:
        self.now, self.reads, self.notices = 0.0, [], 0
        self.errors: dict[str, Exception] = {}
        self.device, self.loader = Device(), Later()
        self.host: HostCache[FakeWeights] = HostCache(self.read, 1000)
        self.pool: AdapterPool[FakeWeights] = AdapterPool(
            SlotTable(["q"], capacity, slots, 0),
            self.device,
            self.host,
            self.loader,
            self.notify,
            lambda: self.now,
            frequency,
        )

    def read(self, digest: str) -> FakeWeights:
        self.reads.append(digest)
        if digest in self.errors:
            raise self.errors[digest]
        return FakeWeights(AdapterSpec(digest, "lora", None, False, {"q": int(digest.split("-")[0])}, frozenset(), 10))

    def notify(self) -> None:
        self.notices += 1

    def settle(self) -> None:
        for _ in range(2):
            self.loader.do_all()
            self.pool.poll()

    def bring(self, digest: str) -> Lease:
        """A lease on an adapter that has room."""
        lease = self.pool.try_acquire(digest)
        if lease is None:
            self.settle()
            lease = self.pool.try_acquire(digest)
        assert lease is not None
        return lease

    def resident(self, *digests: str) -> list[bool]:
        return [self.pool.residency(digest).tier == "resident" for digest in digests]

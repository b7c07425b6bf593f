"""Which policy keeps more of what is asked again: zipf traffic, scans over adapters that are asked once, and drift."""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from loramux_adapters.residency import frequency as module
from loramux_adapters.residency.frequency import Frequency
from loramux_adapters.residency.host import HostCache
from loramux_adapters.spec import AdapterSpec
from support.pool_harness import FakeWeights, PoolHarness

SLOTS = 16
POPULATION = 300
REQUESTS = 4000


@dataclass(frozen=True)
class Traffic:
    """`scan` adapters that are asked once follow on `between` requests by zipf's law; `drift`: favorites change."""

    exponent: float = 1.0
    between: int = 64
    scan: int = 0
    drift: bool = False

    def digests(self, seed: int = 0) -> Iterator[tuple[str, bool]]:
        """(digest, whether it is of the population) of each request."""
        rng = random.Random(seed)
        bounds = list(itertools.accumulate(1 / rank**self.exponent for rank in range(1, POPULATION + 1)))
        favorites = list(range(POPULATION))
        fresh = itertools.count()
        for _ in range(REQUESTS // self.between):
            for _ in range(self.between):
                yield f"8-{favorites[bisect(bounds, rng.random() * bounds[-1])]}", True
            for _ in range(self.scan):
                yield f"8-once-{next(fresh)}", False
            if self.drift:
                one, other = rng.randrange(20), rng.randrange(POPULATION)
                favorites[one], favorites[other] = favorites[other], favorites[one]


def device_hits(traffic: Traffic, frequency: Frequency | None) -> float:
    """The share of the population's requests that find their adapter on the device."""
    harness = PoolHarness(capacity=8 * SLOTS, slots=SLOTS, frequency=frequency)
    asked = found = 0
    for digest, counts in traffic.digests():
        asked += counts
        found += counts and harness.resident(digest) == [True]
        harness.bring(digest).release()
        harness.pool.poll()
    harness.pool.check()
    return found / asked


def host_hits(traffic: Traffic, frequency: Frequency | None) -> float:
    """The same of host memory."""

    def read(digest: str) -> FakeWeights:
        return FakeWeights(AdapterSpec(digest, "lora", None, False, {}, frozenset(), 10))

    cache = HostCache(read, 10 * SLOTS, frequency)
    asked = found = 0
    for digest, counts in traffic.digests():
        asked += counts
        found += counts and cache.size(digest) > 0
        cache.load(digest)
    return found / asked


@pytest.mark.parametrize("hits", [device_hits, host_hits])
@pytest.mark.parametrize(
    ("traffic", "gain"),
    [
        (Traffic(), 0.05),
        (Traffic(scan=32), 0.1),
        (Traffic(exponent=1.3, scan=32), 0.1),
        (Traffic(scan=32, drift=True), 0.05),
        (Traffic(exponent=0.6), 0.03),
    ],
    ids=str,
)
def test_frequency_keeps_more_than_recency(
    hits: Callable[[Traffic, Frequency | None], float], traffic: Traffic, gain: float
) -> None:
    recency, frequency = hits(traffic, None), hits(traffic, Frequency())
    assert frequency > recency + gain


@pytest.mark.parametrize("half_life", [module.HALF_LIFE / 4, module.HALF_LIFE * 4])
def test_the_half_life_is_no_fine_choice(monkeypatch: pytest.MonkeyPatch, half_life: float) -> None:
    traffic = Traffic(scan=32, drift=True)
    recency = device_hits(traffic, None)
    monkeypatch.setattr(module, "HALF_LIFE", half_life)
    assert device_hits(traffic, Frequency()) > recency + 0.03


def test_a_newcomer_waits_for_its_first_request_however_rare_it_is() -> None:
    """Else it would be evicted by the next load before anybody could lease it, again and again."""
    harness = PoolHarness(capacity=16, slots=2, frequency=Frequency())
    for _ in range(5):
        harness.bring("8-hot").release()
        harness.pool.poll()
    assert harness.pool.try_acquire("8-new") is None
    harness.settle()
    harness.pool.poll()
    assert harness.pool.try_acquire("8-newer") is None
    harness.settle()
    assert harness.resident("8-new", "8-newer") == [True, True]
    lease = harness.pool.try_acquire("8-new")
    assert lease is not None
    lease.release()


def test_what_is_gone_is_forgotten_and_memory_is_bounded() -> None:
    frequency = Frequency()
    frequency.use("a")
    frequency.use("a")
    frequency.use("b")
    assert frequency.weight("a") > frequency.weight("b") > frequency.weight("c")
    frequency.forget("a")
    assert frequency.weight("a") == frequency.weight("c")
    for _ in range(4):
        frequency.use("hot")
    for number in range(20_000):
        frequency.use(f"once-{number}")
        if number % 1000 == 0:
            frequency.use("hot")
    assert len(frequency._weights) <= 8192
    assert frequency.weight("hot") > frequency.weight("once-19999") > float("-inf")
    harness = PoolHarness(frequency=frequency)
    harness.bring("8-gone").release()
    harness.pool.discard("8-gone")
    harness.pool.poll()
    assert frequency.weight("8-gone") == float("-inf")

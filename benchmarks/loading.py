"""Inter-token times of running streams while adapters load in turn, against the same streams alone.

    python benchmarks/loading.py [--shape 125m] [--adapters 200] [--streams 8] [--prompt 2] [--rounds 3] [--cache DIR]

The engine runs in this process, without a network. The streams decode on the base; beside them one request after the
other asks for an adapter that is not on the device: its bytes are read, prepared and copied while the streams go on,
and the device budget holds an eighth of the adapters, so most loads evict another one. Its prompt is short: a prefill
of 64 tokens makes a step of the 125M shape three times as long, and would be all that the tail shows. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from loramux.bench.driver import Call
from loramux.bench.engine_driver import EngineDriver
from loramux.bench.shapes import get_shape, make_adapters, make_checkpoint
from loramux.bench.workload import AdapterPlan
from loramux.machine import describe

PROMPT_TOKENS = 64


def gaps_of(arrivals: tuple[float, ...]) -> list[float]:
    """Milliseconds between tokens of one stream."""
    return [(after - before) * 1e3 for before, after in pairwise(arrivals)]


def describe_gaps(gaps: list[float]) -> dict[str, float]:
    """Milliseconds."""
    percentiles = statistics.quantiles(gaps, n=1000)
    shown = {"p50": percentiles[499], "p99": percentiles[989], "p99.9": percentiles[998], "max": max(gaps)}
    return {name: round(value, 2) for name, value in shown.items()}


class Streams:
    """Requests on the base, one after the other in each stream, until `stop`."""

    def __init__(self, driver: EngineDriver, vocabulary: int, count: int) -> None:
        self._driver, self._vocabulary = driver, vocabulary
        self._random = random.Random(0)
        self._stopping = False
        self.gaps: list[float] = []
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    def prompt(self) -> tuple[int, ...]:
        """Random, never cached."""
        return tuple(self._random.randrange(3, self._vocabulary) for _ in range(PROMPT_TOKENS))

    async def stop(self) -> None:
        """Ends the streams after the request that each is at."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self, number: int) -> None:
        while not self._stopping:
            (trace,) = await self._driver.run([Call(self.prompt(), None)], 128, f"stream {number}")
            self.gaps += gaps_of(trace.arrivals)


async def measure(driver: EngineDriver, vocabulary: int, options: argparse.Namespace, order: random.Random) -> dict:
    """One round: the streams alone, then beside loads."""
    adapters = options.adapters
    alone = Streams(driver, vocabulary, options.streams)
    await asyncio.sleep(10)
    await alone.stop()
    beside = Streams(driver, vocabulary, options.streams)
    loop = asyncio.get_running_loop()
    started = loop.time()
    numbers = list(range(adapters))
    order.shuffle(numbers)
    for number in numbers:
        await driver.run([Call(beside.prompt()[: options.prompt], number)], 1, "load")
    seconds = loop.time() - started
    await beside.stop()
    return {
        "alone_ms": describe_gaps(alone.gaps),
        "loading_ms": describe_gaps(beside.gaps),
        "seconds_per_load": round(seconds / adapters, 4),
    }


async def main(options: argparse.Namespace, model: Path, paths: list[Path], scratch: Path) -> list[dict]:
    """All rounds; in the first one adapters come from the store, later from host memory."""
    size = sum(file.stat().st_size for file in paths[0].iterdir())
    settings = {
        "model": str(model),
        "threads": str(describe().usable_cores),
        "adapter_device_bytes": str(max(1, options.adapters // 8) * size),
        "adapter_host_bytes": str((options.adapters + 1) * size),
        "max_adapters": str(options.adapters),
        "dtype": "bfloat16",
    }
    driver = EngineDriver(paths, options=settings, scratch=scratch)
    await driver.start()
    try:
        vocabulary, order = get_shape(options.shape).vocabulary, random.Random(1)
        return [await measure(driver, vocabulary, options, order) for _ in range(options.rounds)]
    finally:
        await driver.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2, help="tokens of the requests that load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "loramux-bench")
    chosen = parser.parse_args()
    checkpoint = make_checkpoint(chosen.shape, 0, chosen.cache)
    directories = make_adapters(chosen.shape, AdapterPlan(rank=8), chosen.adapters, 0, chosen.cache)
    with tempfile.TemporaryDirectory(prefix="loramux-loading-") as folder:
        rounds = asyncio.run(main(chosen, checkpoint, directories, Path(folder)))
    print(json.dumps({"machine": describe().cpu, "rounds": rounds}, indent=2))

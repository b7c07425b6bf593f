"""Time to the first token of an adapter's turn on a conversation that the base's KV cache holds.

    python benchmarks/activated.py [--shape 125m] [--context 2000] [--rounds 7] [--cache DIR]

Each round computes a context of random tokens with the base, then asks three turns on it: the base's own, an activated
LoRA's, which shares the context, and a plain LoRA's of the same weights, which computes it anew. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path

from loramux.bench.driver import Call
from loramux.bench.engine_driver import EngineDriver
from loramux.bench.shapes import get_shape, make_adapters, make_checkpoint
from loramux.bench.workload import INVOCATION, AdapterPlan
from loramux.machine import describe
from loramux_adapters.threads import limit_spinning

TURN = [21, 22, 23, 24, 25]


def activated_copy(directory: Path, out: Path) -> Path:
    """The same tensors, active from INVOCATION on."""
    shutil.copytree(directory, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": list(INVOCATION)}))
    return out


async def measure(driver: EngineDriver, vocabulary: int, context: int, order: random.Random) -> dict[str, float]:
    """Seconds to the first token, by turn; the turns in random order."""
    length = context + order.randrange(16)  # it ends anywhere in a block of the cache
    prompt = tuple(order.randrange(100, vocabulary) for _ in range(length))
    await driver.run([Call(prompt, None)], 1, "turns")
    turns = {"base": None, "activated": 0, "plain": 1}
    names = list(turns)
    order.shuffle(names)
    seconds = {}
    for name in names:
        (trace,) = await driver.run([Call((*prompt, *INVOCATION, *TURN), turns[name])], 1, "turns")
        seconds[name] = trace.arrivals[0] - trace.sent
    return seconds


async def main(options: argparse.Namespace, model: Path, paths: list[Path], scratch: Path) -> list[dict[str, float]]:
    """All rounds, after one that is not counted."""
    settings = {"model": str(model), "threads": str(describe().usable_cores), "dtype": "bfloat16"}
    driver = EngineDriver(paths, options=settings, scratch=scratch)
    await driver.start()
    try:
        vocabulary, order = get_shape(options.shape).vocabulary, random.Random(1)
        rounds = [await measure(driver, vocabulary, options.context, order) for _ in range(options.rounds + 1)]
        return rounds[1:]
    finally:
        await driver.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "loramux-bench")
    chosen = parser.parse_args()
    limit_spinning()  # before torch, as a server does
    checkpoint = make_checkpoint(chosen.shape, 0, chosen.cache)
    (plain,) = make_adapters(chosen.shape, AdapterPlan(rank=8), 1, 0, chosen.cache)
    with tempfile.TemporaryDirectory(prefix="loramux-activated-") as folder:
        activated = activated_copy(plain, Path(folder) / "activated")
        rounds = asyncio.run(main(chosen, checkpoint, [activated, plain], Path(folder) / "data"))
    medians = {name: round(statistics.median(each[name] for each in rounds) * 1e3, 1) for name in rounds[0]}
    ratios = {name: round(statistics.median(each[name] / each["base"] for each in rounds), 2) for name in rounds[0]}
    print(json.dumps({"machine": describe().cpu, "first_token_ms": medians, "ratio_to_base": ratios}, indent=2))

"""One OFT adapter among 15 LoRA rows, against 16 LoRA rows: what a weight of its own takes of memory and of speed.

    python benchmarks/dense.py [--shape 125m] [--rounds 5] [--block 32] [--cache DIR] [OPTION=VALUE ...]

The engine runs in this process, without a network. 16 requests at once, each on an adapter of its own that is on the
device already, 128 tokens in and 64 out; the two batches take turns, and each ratio is of one round: of the output
tokens a second, and a second of processor time, which others on the machine disturb less. All seven linears of every
layer are adapted. OPTION is one of the server's (dtype=float32). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from loramux.bench.driver import Call
from loramux.bench.engine_driver import EngineDriver
from loramux.bench.shapes import Shape, get_shape, make_adapters, make_checkpoint
from loramux.bench.workload import AdapterPlan
from loramux.machine import describe

ROWS, PROMPT_TOKENS, OUTPUT_TOKENS, RANK = 16, 128, 64, 8
HALF = 2  # bytes of a weight on the device in half precision


def make_oft(shape: Shape, block: int, directory: Path) -> Path:
    """A PEFT directory of random rotations of `block` inputs each."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(shape.layers):
        for site, (wide, _) in shape.linears().items():
            skew = torch.randn(wide // block, block * (block - 1) // 2, generator=generator) * 0.02
            tensors[f"base_model.model.model.layers.{layer}.{site}.oft_R.weight"] = skew
    config = {
        "peft_type": "OFT",
        "peft_version": "0.21.2",
        "r": 0,
        "oft_block_size": block,
        "target_modules": sorted(site.rpartition(".")[2] for site in shape.linears()),
    }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


async def speed(driver: EngineDriver, vocabulary: int, adapters: list[int], salt: str) -> tuple[float, float]:
    """Output tokens of one burst a second, and a second of this process's processor time."""
    draw = random.Random(salt)
    calls = [Call(tuple(draw.randrange(3, vocabulary) for _ in range(PROMPT_TOKENS)), each) for each in adapters]
    before = time.process_time()
    traces = await driver.run(calls, OUTPUT_TOKENS, salt)
    spent = time.process_time() - before
    begin, end = min(trace.sent for trace in traces), max(trace.arrivals[-1] for trace in traces)
    tokens = sum(len(trace.arrivals) for trace in traces)
    return tokens / (end - begin), tokens / spent


def compare(rounds: list[dict[str, tuple[float, float]]], clock: int) -> dict[str, object]:
    """Medians over the rounds, by the clock of that number."""
    ratios = [each["oft"][clock] / each["lora"][clock] for each in rounds]
    speeds = {name: round(statistics.median(each[name][clock] for each in rounds), 1) for name in ("lora", "oft")}
    return {**speeds, "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}


async def main(options: argparse.Namespace, model: Path, paths: list[Path], scratch: Path) -> list[dict]:
    """The first round warms up and is forgotten."""
    settings = {
        "model": str(model),
        "threads": str(describe().usable_cores),
        "max_adapters": str(len(paths)),
        "adapter_device_bytes": str(3 << 29),
        "dtype": "bfloat16",
        **dict(option.split("=", 1) for option in options.options),
    }
    driver = EngineDriver(paths, options=settings, scratch=scratch)
    await driver.start()
    batches = {"lora": list(range(ROWS)), "oft": [*range(ROWS - 1), ROWS]}
    rounds = []
    try:
        for number in range(options.rounds + 1):
            order = list(batches) if number % 2 else list(reversed(batches))
            rounds.append(
                {
                    name: await speed(driver, get_shape(options.shape).vocabulary, batches[name], f"{number} {name}")
                    for name in order
                }
            )
    finally:
        await driver.close()
    return rounds[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="*", help="options of the server, as NAME=VALUE")
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "loramux-bench")
    chosen = parser.parse_args()
    sizes = list(get_shape(chosen.shape).linears().values()) * get_shape(chosen.shape).layers
    checkpoint = make_checkpoint(chosen.shape, 0, chosen.cache)
    loras = make_adapters(chosen.shape, AdapterPlan(rank=RANK), ROWS, 0, chosen.cache)
    with tempfile.TemporaryDirectory(prefix="loramux-dense-") as folder:
        oft = make_oft(get_shape(chosen.shape), chosen.block, Path(folder) / "oft")
        measured = asyncio.run(main(chosen, checkpoint, [*loras, oft], Path(folder) / "store"))
        file_bytes = {"lora": loras[0], "oft": oft}
        result = {
            "machine": describe().cpu,
            "file_bytes": {
                name: (path / "adapter_model.safetensors").stat().st_size for name, path in file_bytes.items()
            },
            "device_bytes": {
                "lora": sum(RANK * (wide + out) for wide, out in sizes) * HALF,
                "oft": sum(wide * out for wide, out in sizes) * HALF,
            },
            "tokens_per_second": compare(measured, 0),
            "tokens_per_processor_second": compare(measured, 1),
        }
    print(json.dumps(result, indent=2))

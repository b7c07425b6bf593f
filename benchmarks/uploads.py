"""From an upload's last byte to the first token with the new version, idle and beside streams.

    python benchmarks/uploads.py [--shape 125m] [--rank 16] [--pushes 15] [--seconds 1] [--streams 0 8] [--rounds 2]
                                 [--driver grpc engine] [--cache DIR] [--out DIR]

A client pushes a new version of one adapter every second and asks for one token with it, while streams generate on the
base. `grpc` is a server in a process of its own, and the result; `engine` is a server's inside in this process, which
says how long each stage took. Writes a page and a JSON document, as `loramux bench` does.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from loramux.bench import report
from loramux.bench.driver import PushingDriver
from loramux.bench.engine_driver import EngineDriver
from loramux.bench.grpc_driver import GrpcDriver
from loramux.bench.shapes import get_shape, make_adapter, make_checkpoint
from loramux.bench.uploads import UploadPlan, UploadSample, measure_uploads, summarize_uploads, upload_lines
from loramux.bench.workload import AdapterPlan
from loramux.machine import describe
from loramux.terminal.output import say
from loramux_adapters.threads import limit_spinning

SEED = 1


async def main(
    options: argparse.Namespace, plan: UploadPlan, settings: dict[str, str], adapter: Path, scratch: Path
) -> list[UploadSample]:
    """All rounds."""
    from loramux.bench.stages import StageClock

    clock = StageClock()
    made: dict[str, PushingDriver] = {
        "engine": EngineDriver([], options=settings, scratch=scratch / "store", stages=clock),
        "grpc": GrpcDriver([], address=None, options=settings, scratch=scratch),
    }
    async with AsyncExitStack() as stack:
        stack.enter_context(clock.running())
        drivers = [made[name] for name in options.driver]
        for driver in drivers:
            stack.push_async_callback(driver.close)
            await driver.start()
        return await measure_uploads(
            plan, drivers, adapter, get_shape(options.shape).vocabulary, scratch / "versions", say
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pushes", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--driver", nargs="+", choices=["grpc", "engine"], default=["grpc", "engine"])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "loramux-bench")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    chosen = parser.parse_args()
    limit_spinning()  # before torch, as a server does
    report.prepare(chosen.out)
    checkpoint = make_checkpoint(chosen.shape, SEED, chosen.cache)
    version = make_adapter(chosen.shape, AdapterPlan(rank=chosen.rank), 0, SEED, chosen.cache)
    what = UploadPlan(chosen.pushes, chosen.seconds, tuple(chosen.streams), chosen.rounds)
    used = {"model": str(checkpoint), "threads": str(describe().usable_cores), "dtype": "auto"}
    with tempfile.TemporaryDirectory(prefix="loramux-uploads-") as folder:
        samples = asyncio.run(main(chosen, what, used, version, Path(folder)))
    summaries, machine, taken = summarize_uploads(samples), describe(), datetime.now(UTC)
    name = f"uploads-{chosen.shape}"
    mebibytes = (version / "adapter_model.safetensors").stat().st_size / 2**20
    page = "\n".join(
        [
            f"# {name}, {taken:%Y-%m-%d %H:%M} UTC",
            "",
            f"A LoRA of rank {chosen.rank} on all linears of the shape {chosen.shape}, {mebibytes:.1f} MiB, "
            f"pushed every {chosen.seconds:g} s under one name and asked for one token, "
            f"{chosen.rounds} rounds in which cases and drivers alternate. Milliseconds after the last byte was sent; "
            "the ratio is to the case of fewest streams, of medians of the same round.",
            "",
            *upload_lines(summaries),
            "",
            *report.machine_lines(machine, {"threads": used["threads"], "drivers": ", ".join(chosen.driver)}),
            "",
        ]
    )
    values = {
        "format": report.FORMAT,
        "taken": taken.isoformat(timespec="seconds"),
        "plan": dataclasses.asdict(what),
        "machine": dataclasses.asdict(machine),
        "summary": [dataclasses.asdict(entry) for entry in summaries],
        "rounds": [dataclasses.asdict(entry) for entry in samples],
    }
    json_path, page_path = report.write(chosen.out, f"{name}-{taken:%Y%m%dT%H%M%SZ}", values, page)
    print(page)
    say(f"wrote {json_path} and {page_path}")

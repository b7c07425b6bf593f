"""What the number of registered adapters costs: start, listing in pages, upload and first use, at 10, 1,000, 10,000.

    python benchmarks/registered.py [--counts 10 1000 10000] [--repeats 20] [--cache DIR]

A real server on the embedded base for each count, on a store that was filled before without waiting for the disk. The
adapters are tiny, so what grows with their number is seen and not their bytes. Prints one JSON object; times in
milliseconds, medians with the 90th percentile, the start in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save

from loramux import Client
from loramux.local_server import LocalServer
from loramux.machine import describe
from loramux_adapters.base.load import load_base
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.spec import BaseModelSpec
from loramux_adapters.store import schema
from loramux_adapters.store.disk import Disk
from loramux_adapters.store.local import LocalStore
from loramux_adapters.store.records import FileEntry, Quotas, UploadManifest

TENANT = "default"
QUOTAS = Quotas(max_adapters=1_000_000)
OPTIONS = {"dtype": "float32", "kv_bytes": "16MiB", "max_adapters": "1000000", "readiness_seconds": "0"}


class _QuickDisk(Disk):
    """Waits for no disk."""

    def sync(self, path: Path) -> None:
        assert path.exists()


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = schema.connect(path, busy_seconds)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def make_files(seed: int) -> dict[str, bytes]:
    """A LoRA of rank 1 on one projection of the embedded base."""
    config = json.loads((tiny_path() / "config.json").read_text())
    width, queries = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(1, width, generator=generator),
        f"{module}.lora_B.weight": torch.randn(queries, 1, generator=generator),
    }
    peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    return {
        "adapter_config.json": json.dumps(peft).encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }


def fill(data_dir: Path, base: BaseModelSpec, numbers: Iterable[int]) -> None:
    """Publish adapters by number, as uploads do."""
    with LocalStore(data_dir, QUOTAS, disk=_QuickDisk(), connect=_connect) as store:
        for number in numbers:
            files = make_files(number)
            entries = tuple(FileEntry(f, len(data), hashlib.sha256(data).hexdigest()) for f, data in files.items())
            upload_id = f"filling-{number:08}"
            store.begin_upload(TENANT, upload_id, UploadManifest(f"adapter-{number:08}", entries))
            for file, data in files.items():
                store.write_chunk(TENANT, upload_id, file, 0, data)
            staged = store.staged_files(TENANT, upload_id)
            spec = formats.read(staged.files, base, ReadLimits()).spec
            store.publish(TENANT, upload_id, spec, base.fingerprint)


def times(work: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Milliseconds of `work(0)`, `work(1)`, ..."""
    taken = []
    for number in range(repeats):
        start = time.perf_counter()
        work(number)
        taken.append((time.perf_counter() - start) * 1e3)
    return {"p50": round(statistics.median(taken), 2), "p90": round(statistics.quantiles(taken, n=10)[8], 2)}


def measure(data_dir: Path, count: int, repeats: int, scratch: Path) -> dict[str, object]:
    """One server on a filled store."""
    start = time.perf_counter()
    with LocalStore(data_dir, QUOTAS):
        opened = time.perf_counter() - start
    start = time.perf_counter()
    options = {**OPTIONS, "data_dir": str(data_dir)}
    with LocalServer(options, log=scratch / "log") as server, Client(server.address) as client:
        started = time.perf_counter() - start
        pages = times(lambda _: list(itertools.islice(client.adapters(page_size=100), 100)), repeats)
        start = time.perf_counter()
        listed = sum(1 for _ in client.adapters(page_size=1000))
        whole = time.perf_counter() - start
        if listed != count:
            raise RuntimeError(f"{listed} adapters listed, not {count}")

        def push(number: int) -> None:
            directory = scratch / f"new-{number}"
            directory.mkdir()
            for file, data in make_files(10_000_000 + count + number).items():
                (directory / file).write_bytes(data)
            client.push(directory, f"new-{number}")

        def ask(number: int) -> None:
            client.generate(
                "Hello", adapter=f"adapter-{number * max(1, count // repeats):08}", max_tokens=1, temperature=0.0
            )

        ask_base = times(lambda _: client.generate("Hello", max_tokens=1, temperature=0.0), repeats)
        result = {
            "adapters": count,
            "store_open_seconds": round(opened, 3),
            "start_seconds": round(started, 2),
            "first_page_of_100_ms": pages,
            "list_all_seconds": round(whole, 3),
            "upload_ms": times(push, repeats),
            "first_use_ms": times(ask, min(repeats, count)),
            "base_ms": ask_base,
        }
        for number in range(repeats):
            client.delete(f"new-{number}")
            shutil.rmtree(scratch / f"new-{number}")
        result["delete_ms"] = times(lambda number: client.delete(f"adapter-{count - 1 - number:08}"), min(5, count))
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cache", type=Path, help="where filled stores are kept and found again")
    arguments = parser.parse_args()
    base = load_base(tiny_path(), compute_dtype=torch.float32).spec
    results = []
    with tempfile.TemporaryDirectory(prefix="loramux-registered-") as temporary:
        cache = arguments.cache or Path(temporary) / "stores"
        for count in arguments.counts:
            filled = cache / str(count)
            if not filled.exists():
                fill(filled, base, range(count))
            used = Path(temporary) / f"data-{count}"
            shutil.copytree(filled, used)
            results.append(measure(used, count, arguments.repeats, Path(temporary)))
            shutil.rmtree(used)
    print(json.dumps({"machine": describe().__dict__, "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()

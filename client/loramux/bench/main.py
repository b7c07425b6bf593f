"""One bench from options to results: checkpoint, adapters, drivers, measurement, report.

Knows which drivers there are; how each works is its own matter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from loramux.bench import report, train_report
from loramux.bench.driver import Driver
from loramux.bench.kinds import make_members
from loramux.bench.session import measure
from loramux.bench.shapes import adapters_root, get_shape, make_checkpoint
from loramux.bench.stats import summarize
from loramux.bench.train_bench import measure_count, measure_speed, summarize_speed, systems_of
from loramux.bench.train_workload import CountWorkload, SpeedWorkload, find_training
from loramux.bench.workload import Workload, WorkloadInvalid, read_workload
from loramux.machine import describe
from loramux_adapters.embedded.tiny import TINY_NAME, tiny_path
from loramux_adapters.threads import limit_spinning

if TYPE_CHECKING:
    from loramux.bench.profile import StepProfile


@dataclass(frozen=True)
class BenchOptions:
    """What the command line asks for; None means the workload's or the machine's own."""

    workload: str
    drivers: tuple[str, ...]
    address: str | None = None
    rounds: int | None = None
    threads: int | None = None
    dtype: str = "auto"
    cache: Path | None = None
    out: Path = Path("benchmarks/results")
    profile_step: bool = False


@dataclass(frozen=True)
class BenchResults:
    """What was measured. `name` is the stem of its files."""

    name: str
    values: dict[str, Any]
    page: str


def run(options: BenchOptions, announce: Callable[[str], None]) -> BenchResults:
    """Measure. Raises WorkloadInvalid, ResultsUnwritable, DriverFailed and the client's errors."""
    limit_spinning()  # before torch comes: the engine in this process is to compute as a server does
    training = find_training(options.workload)
    if training is not None:
        return _train(training, options, announce)
    workload = read_workload(options.workload)
    report.prepare(options.out)
    if options.rounds is not None:
        workload = dataclasses.replace(workload, rounds=options.rounds)
    cache = _cache(options)
    names = _fitting(options.drivers, workload, announce)
    announce(f"shape {workload.shape}: checkpoint and {len(workload.members)} adapters in {cache}")
    model = make_checkpoint(workload.shape, workload.seed, cache)
    adapters = make_members(workload, model, cache)
    threads = options.threads or describe().usable_cores
    dtype = _resolve_dtype(options.dtype)
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
        settings = _Settings(workload, model, adapters, threads, dtype, Path(scratch), cache)
        drivers = [_make_driver(name, settings, options) for name in names]
        samples = asyncio.run(measure(workload, drivers, get_shape(workload.shape).vocabulary, announce))
        profile = _profile(settings) if options.profile_step else None
    summaries = summarize(samples, [scenario.name for scenario in workload.scenarios])
    machine, taken = describe(), datetime.now(UTC)
    shown: dict[str, Any] = {"threads": threads, "dtype": dtype, "drivers": ", ".join(names)}
    shown |= workload.server
    if options.address is not None:
        # Its threads, dtype and machine are the server's own: what stands here is of this process and its peers.
        shown["grpc server"] = f"{options.address}, running with settings and on a machine of its own"
        if names == ("grpc",):
            del shown["threads"], shown["dtype"]
    values = report.document(workload, machine, summaries, samples, shown, taken)
    page = report.markdown(workload, machine, summaries, shown, taken)
    if profile is not None:
        values["profile"] = dataclasses.asdict(profile)
        page += "\n" + "\n".join(report.profile_lines(profile)) + "\n"
    return BenchResults(_stem(workload.name, taken), values, page)


def _cache(options: BenchOptions) -> Path:
    return options.cache or Path(platformdirs.user_cache_dir("loramux", appauthor=False)) / "bench"


def _train(
    workload: SpeedWorkload | CountWorkload, options: BenchOptions, announce: Callable[[str], None]
) -> BenchResults:
    """The same for a workload of training, whose drivers are the trainer and PEFT. Raises WorkloadInvalid for an option
    that would not take effect."""
    counts = isinstance(workload, CountWorkload)
    refused = {
        "--address": options.address is not None,
        "--profile-step": options.profile_step,
        "--dtype": options.dtype != "auto",
        "--driver grpc": "grpc" in options.drivers,
        "--driver peft alone": options.drivers == ("peft",),
        "--rounds": counts and options.rounds is not None,
    }
    for option in (option for option, is_given in refused.items() if is_given):
        raise WorkloadInvalid(f"{option} has no effect on {workload.name}", remedy="leave it out")
    report.prepare(options.out)
    model = (
        tiny_path() if workload.shape == TINY_NAME else make_checkpoint(workload.shape, workload.seed, _cache(options))
    )
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
        if isinstance(workload, CountWorkload):
            workload = dataclasses.replace(workload, threads=options.threads or workload.threads)
            counted = measure_count(workload, model, Path(scratch), announce)
            machine, taken = describe(), datetime.now(UTC)
            values = train_report.count_document(workload, machine, counted, taken)
            page = train_report.count_page(workload, machine, counted, taken)
        else:
            threads = workload.threads if options.threads is None else (options.threads,)
            workload = dataclasses.replace(workload, threads=threads, rounds=options.rounds or workload.rounds)
            systems = systems_of(workload, peft="peft" in options.drivers)
            samples = measure_speed(workload, systems, model, Path(scratch), announce)
            summaries = summarize_speed(samples, systems)
            machine, taken = describe(), datetime.now(UTC)
            values = train_report.speed_document(workload, machine, summaries, samples, taken)
            page = train_report.speed_page(workload, machine, summaries, systems, taken)
    return BenchResults(_stem(workload.name, taken), values, page)


def _stem(name: str, taken: datetime) -> str:
    return f"{name}-{taken:%Y%m%dT%H%M%SZ}"


def _fitting(drivers: tuple[str, ...], workload: Workload, announce: Callable[[str], None]) -> tuple[str, ...]:
    """Without the peer where it cannot do what the workload asks."""
    if workload.is_static or "peft" not in drivers:
        return drivers
    left = tuple(name for name in drivers if name != "peft")
    if not left:
        raise WorkloadInvalid(f"{workload.name} is more than one batch of LoRA: peft cannot run it")
    announce(f"the peft driver is left out: {workload.name} is more than one batch of LoRA")
    return left


@dataclass(frozen=True)
class _Settings:
    """What all drivers share."""

    workload: Workload
    model: Path
    adapters: list[Path]
    threads: int
    dtype: str
    scratch: Path
    cache: Path

    def server_options(self) -> dict[str, str]:
        """Options of `loramux serve`; room for every request of the workload at once, unless it says otherwise."""
        workload = self.workload
        options = {
            "model": str(self.model),
            "threads": str(self.threads),
            "dtype": self.dtype,
            "max_running": str(max(64, workload.most_at_once)),
        }
        if workload.slots:
            row_bytes = get_shape(workload.shape).rank_row_weights() * (4 if self.dtype == "float32" else 2)
            options["adapter_device_bytes"] = str(workload.slots * workload.adapters.rank * row_bytes)
            options["adapter_extra_bytes"] = "0"
        if workload.keep_store:
            root = adapters_root(workload.shape, workload.adapters, workload.seed, self.cache)
            options["data_dir"] = str(root.with_name(f"{root.name}-store"))
        return options | workload.server


def _profile(settings: _Settings) -> StepProfile:
    from loramux.bench.profile import profile_steps

    vocabulary = get_shape(settings.workload.shape).vocabulary
    scratch = settings.scratch / "profile"
    return asyncio.run(
        profile_steps(settings.workload, settings.adapters, settings.server_options(), scratch, vocabulary)
    )


def _make_driver(name: str, settings: _Settings, options: BenchOptions) -> Driver:
    if name == "engine":
        from loramux.bench.engine_driver import EngineDriver

        return EngineDriver(settings.adapters, options=settings.server_options(), scratch=settings.scratch / "engine")
    if name == "grpc":
        from loramux.bench.grpc_driver import GrpcDriver

        return GrpcDriver(
            settings.adapters, address=options.address, options=settings.server_options(), scratch=settings.scratch
        )
    from loramux.bench.peft_driver import PeftDriver

    log = settings.scratch / "peft.log"
    return PeftDriver(settings.model, settings.adapters, threads=settings.threads, dtype=settings.dtype, log=log)


def _resolve_dtype(wanted: str) -> str:
    """The server's rule for `auto`, so that every driver and peer computes in the same dtype."""
    if wanted != "auto":
        return wanted
    import torch

    fast = torch.cuda.is_available() or "avx512_bf16" in describe().flags
    return "bfloat16" if fast else "float32"

"""`loramux bench`: mixed batches against base only, and against PEFT, in interleaved rounds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from loramux.terminal.failures import CommandError, ExitCode, install_hint
from loramux.terminal.output import print_json, say
from loramux.terminal.signals import terminated_as_interrupted


def command(
    workload: Annotated[str, typer.Option("--workload", "-w", help="Shipped workload or TOML file.")] = "mixed-125m",
    driver: Annotated[
        list[str] | None,
        typer.Option(help="engine (in process; of training: the trainer), grpc or peft; repeat to alternate several."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", "-a", help="For grpc: a running server with the workload's shape.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the workload's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a driver; default: all cores.")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Compute dtype.")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Where random checkpoints are kept.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of results.")] = Path("benchmarks/results"),
    profile_step: Annotated[
        bool, typer.Option("--profile-step", help="Also show where a mixed decode step's milliseconds go.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON on stdout too.")] = False,
) -> None:
    """Measure output tokens/s and latency, or tokens/s of training (-w train-125m).

    Writes JSON and a Markdown table with the machine described.
    """
    from loramux.bench.driver import DriverFailed
    from loramux.bench.main import BenchOptions, run
    from loramux.bench.report import ResultsUnwritable, write
    from loramux.bench.workload import WorkloadInvalid
    from loramux.terminal.quiet import hush_bars

    drivers = tuple(dict.fromkeys(driver or ["engine", "peft"]))
    unknown = [name for name in drivers if name not in ("engine", "grpc", "peft")]
    if unknown:
        raise CommandError(f"no driver {unknown[0]!r}", remedy="use engine, grpc or peft", code=ExitCode.USAGE)
    if address is not None and "grpc" not in drivers:
        raise CommandError("--address is for the grpc driver", remedy="add --driver grpc", code=ExitCode.USAGE)
    if profile_step and "engine" not in drivers:
        raise CommandError("--profile-step needs the engine driver", remedy="add --driver engine", code=ExitCode.USAGE)
    if "peft" in drivers and find_spec("peft") is None:
        drivers = tuple(name for name in drivers if name != "peft")
        if not drivers:
            raise CommandError("the peft driver needs peft", remedy=install_hint("bench"), code=ExitCode.USAGE)
        say(f"the peft driver is left out, for peft is not here: {install_hint('bench')}")
    hush_bars()
    try:
        options = BenchOptions(workload, drivers, address, rounds, threads, dtype, cache, out, profile_step)
        with terminated_as_interrupted():
            results = run(options, say)
        if as_json:
            print_json(results.values)
        else:
            print(results.page)
        json_path, page_path = write(out, results.name, results.values, results.page)
    except WorkloadInvalid as error:
        raise CommandError(str(error), remedy=error.remedy, code=ExitCode.USAGE) from error
    except ResultsUnwritable as error:
        raise CommandError(str(error), remedy="give another directory with --out") from error
    except DriverFailed as error:
        raise CommandError(str(error), code=ExitCode.FAULT) from error
    say(f"wrote {json_path} and {page_path}")

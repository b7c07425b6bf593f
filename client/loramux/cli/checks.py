"""The checks of `loramux doctor`: each looks at one thing and says ok, note, warn or fail, and what to do.

They change nothing and open no connection.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loramux.machine import describe, find_version
from loramux.terminal.failures import install_hint

if TYPE_CHECKING:
    from loramux_server.config import ServeConfig

State = Literal["ok", "note", "warn", "fail"]
SERVING = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy", "regex", "jinja2")
MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when all is well."""

    check: str
    state: State
    detail: str
    remedy: str = ""


def examine(config: ServeConfig) -> list[Finding]:
    """Every check, in the order in which a start would meet them."""
    checks: tuple[Callable[[ServeConfig], Iterator[Finding]], ...] = (
        _versions, _processor, _compiler, _torch, _threads, _hub_kernels, _base, _disk, _ports
    )  # fmt: skip
    return [finding for check in checks for finding in check(config)]


def _versions(_: ServeConfig) -> Iterator[Finding]:
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", sys.version.split()[0])
    yield Finding("loramux", "ok", find_version("loramux") or "not installed as a distribution")
    missing = [name for name in SERVING if find_version(name) is None]
    found = ", ".join(f"{name} {version}" for name in SERVING if (version := find_version(name)) is not None)
    if "torch" in missing:
        yield Finding("serving", "note", "torch is not here: this is the client alone", install_hint("serve"))
    elif missing:
        yield Finding("serving", "fail", f"missing: {', '.join(missing)}", install_hint("serve"))
    else:
        yield Finding("serving", "ok", found)


def _processor(_: ServeConfig) -> Iterator[Finding]:
    machine = describe()
    detail = f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores, {', '.join(machine.flags) or 'no AVX'}"
    if "avx512_bf16" in machine.flags:
        tiles = "with" if "amx_bf16" in machine.flags else "without"
        yield Finding("processor", "ok", f"{detail}; bfloat16 and 4-bit kernels {tiles} AMX")
    else:
        remedy = "--dtype auto takes float32 here; expect half the speed or less of an AVX512-BF16 machine"
        yield Finding("processor", "warn", f"{detail}; no AVX512-BF16, so no 4-bit kernels", remedy)


def _compiler(_: ServeConfig) -> Iterator[Finding]:
    # As the native kernels look for one; asking them would import torch.
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        detail = "no C compiler: plain torch instead of native kernels"
        yield Finding("C compiler", "warn", detail, "install cc (gcc or clang); nothing else needs it")
    else:
        yield Finding("C compiler", "ok", f"{compiler}, for native kernels")


def _torch(config: ServeConfig) -> Iterator[Finding]:
    if find_spec("torch") is None:
        return  # said above
    import torch

    wheel = f"CUDA {torch.version.cuda} wheel" if torch.version.cuda else "CPU wheel"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("device", "ok", f"{names} ({wheel})")
    elif config.device.startswith("cuda"):
        yield Finding("device", "fail", f"{config.device} asked for, no GPU seen ({wheel})", "use --device cpu or auto")
    elif torch.version.cuda:
        remedy = (
            "the CPU wheel is gigabytes smaller: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
        yield Finding("device", "warn", f"cpu, with the {wheel}", remedy)
    else:
        yield Finding("device", "ok", f"cpu ({wheel})")


def _threads(config: ServeConfig) -> Iterator[Finding]:
    machine = describe()
    wanted = config.threads or machine.torch_threads or machine.usable_cores
    forced = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    detail = f"{wanted} for a step" + "".join(f", {name}={value}" for name, value in forced.items())
    if wanted > machine.usable_cores:
        yield Finding("threads", "warn", detail, f"more than the {machine.usable_cores} usable cores: lower --threads")
    elif machine.load_average[0] > machine.usable_cores:
        load = f"{detail}, load average {machine.load_average[0]:.1f}"
        yield Finding("threads", "warn", load, "the machine is busy: a step waits for its slowest thread")
    else:
        yield Finding("threads", "ok", detail)


def _hub_kernels(_: ServeConfig) -> Iterator[Finding]:
    version = find_version("kernels")
    if version is None:
        yield Finding("kernels package", "ok", "absent, as it should be")
    else:
        detail = f"kernels {version} is installed: bitsandbytes then fetches another CPU kernel from a hub at import"
        yield Finding("kernels package", "warn", detail, "pip uninstall kernels")


def _base(config: ServeConfig) -> Iterator[Finding]:
    from loramux_server.config import EMBEDDED_MODEL
    from loramux_server.errors import StartError
    from loramux_server.preflight import check_model

    spec = find_spec("loramux_adapters")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    weights = root / "embedded" / EMBEDDED_MODEL / "model.safetensors"
    if weights.is_file():
        yield Finding("embedded base", "ok", f"{EMBEDDED_MODEL}, {weights.stat().st_size / 2**20:.1f} MiB")
    else:
        remedy = "install Loramux again; the wheel carries it"
        yield Finding("embedded base", "fail", f"{EMBEDDED_MODEL} is not at {weights}", remedy)
    if config.model != EMBEDDED_MODEL:
        try:
            check_model(config.model, os.environ, config.revision)
        except StartError as error:
            yield Finding("base", "fail", str(error), error.remedy)
        else:
            yield Finding("base", "ok", config.model)


def _disk(config: ServeConfig) -> Iterator[Finding]:
    existing = next(path for path in (config.data_dir, *config.data_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{config.data_dir}, {free / 2**30:.1f} GiB free"
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("data directory", "fail", f"{existing} is not writable", "choose another with --data-dir")
    elif free < MIN_FREE_BYTES:
        yield Finding("data directory", "warn", detail, "uploads fail when it is full: make room, or --data-dir")
    else:
        yield Finding("data directory", "ok", detail)


def _ports(config: ServeConfig) -> Iterator[Finding]:
    from loramux_server.errors import StartError
    from loramux_server.preflight import check_address

    for name, address in (("listen", config.listen), ("metrics_listen", config.metrics_listen)):
        if address == "none":
            continue
        try:
            check_address(name, address)
        except StartError as error:
            yield Finding(name, "warn", str(error), f"{error.remedy}; fine when it is your own server")
        else:
            yield Finding(name, "ok", f"{address} is free")

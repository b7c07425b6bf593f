"""What machine this is: processor, cores, flags, memory, load, versions. Reads /proc and package metadata only.

Shared by `loramux doctor` and the bench's results; never imports torch itself.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "loramux", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy", "grpcio", "protobuf",
    "peft", "trl", "triton", "kernels",
)  # fmt: skip
FAST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Machine:
    """A description fit to stand beside a measurement. Sizes in bytes; `flags` are those that matter for speed."""

    cpu: str
    cores: int
    usable_cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    load_average: tuple[float, float, float]
    system: str
    python: str
    versions: Mapping[str, str]
    torch_threads: int | None
    accelerators: tuple[str, ...]


def describe() -> Machine:
    """The machine now; torch's threads and devices are filled in when torch is already imported."""
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return Machine(
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=tuple(flag for flag in FAST_FLAGS if flag in (_cpuinfo("flags") or "").split()),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=os.getloadavg(),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := find_version(name)) is not None},
        torch_threads=torch.get_num_threads() if torch is not None else None,
        accelerators=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if torch is not None and cuda
        else (),
    )


def find_version(package: str) -> str | None:
    """The installed version, None when the package is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), None)

"""How much memory can still be taken, and how much a process has taken at most."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_FORGET_PEAK = "5"  # proc(5), clear_refs


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can still be taken; of the CPU what the machine and a container's limit leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), container_free())


def container_free(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit (cgroup v2) leaves, unlike the machine's own figures; file cache counts as free."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return sys.maxsize
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return max(0, limit - used + cached)


def used_bytes(device: torch.device) -> int:
    """What this process has on `device` now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The most that this process has had on `device` since its start, or since `forget_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def forget_peak(device: torch.device) -> None:
    """Begins the peak anew from what is in use now, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)

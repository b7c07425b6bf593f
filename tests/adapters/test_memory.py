"""What memory is left, and the most that a process has had."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from loramux_adapters.memory import container_free, forget_peak, free_bytes, peak_bytes, used_bytes

CPU = torch.device("cpu")
MIB = 1 << 20


def test_free_memory_is_measured() -> None:
    assert MIB < free_bytes(CPU) < 1 << 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, 700),
        ({"memory.max": "1000\n", "memory.current": "990\n", "memory.stat": "active_file 500\ninactive_file 400"}, 910),
        ({"memory.max": "1000\n", "memory.current": "1300\n"}, 0),
        ({"memory.max": "max\n", "memory.current": "300\n"}, sys.maxsize),
        ({}, sys.maxsize),
    ],
    ids=["limit", "file cache", "over the limit", "no limit", "no group"],
)
def test_a_container_has_less_than_its_machine(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, content in ({"memory.stat": ""} | files).items():
        (tmp_path / name).write_text(content)
    assert container_free(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is of the whole life of a process")
def test_a_peak_stays_until_it_is_forgotten() -> None:
    """Pages of its own: malloc keeps what a fleet in this process has freed."""
    forget_peak(CPU)
    held = mmap.mmap(-1, 256 * MIB)
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    in_use = used_bytes(CPU)
    assert in_use > 256 * MIB
    held.close()
    assert peak_bytes(CPU) >= in_use - MIB  # the kernel counts pages of each thread in rounds
    forget_peak(CPU)
    assert peak_bytes(CPU) < in_use - 64 * MIB
    assert abs(peak_bytes(CPU) - used_bytes(CPU)) < 64 * MIB


def test_what_a_gpu_holds_now_is_less_than_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing at load holds both forms of a weight for a moment."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    assert (used_bytes(torch.device("cuda")), peak_bytes(torch.device("cuda"))) == (3, 5)

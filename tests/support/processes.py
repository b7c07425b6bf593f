"""Runs a piece of test code in a process of its own, where the number of threads can be another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_in_threads(threads: int, code: str, *arguments: str) -> str:
    """Runs `code` with torch on `threads` threads; returns its output. Raises AssertionError with its errors."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": str(threads)}
    environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # do not spin where cores are few
    whole = f"import torch; torch.set_num_threads({threads}); assert torch.get_num_threads() == {threads}\n{code}"
    ended = subprocess.run(
        [sys.executable, "-c", whole, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout

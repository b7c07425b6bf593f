"""Runs a piece of test code in a process of its own, where the number of threads can be another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """This process's, in which the tests' own modules are found too."""
    paths = filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_in_threads(threads: int, code: str, *arguments: str) -> str:
    """Runs `code` with torch on `threads` threads; returns its output. Raises AssertionError with its errors."""
    # Passive: do not spin where cores are few.
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    whole = f"import torch; torch.set_num_threads({threads}); assert torch.get_num_threads() == {threads}\n{code}"
    ended = subprocess.run(
        [sys.executable, "-c", whole, *arguments],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout

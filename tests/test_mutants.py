"""The catalog of `make mutants` fits the tree. That tests notice each fault is for `make mutants` itself to show."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_of_the_catalog_can_be_put_in() -> None:
    command = [sys.executable, str(ROOT / "tests/mutants"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

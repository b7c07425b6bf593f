"""A measurement in a process of its own, whose memory is then its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from loramux_trainer.errors import TrainerError


class TrialFailed(TrainerError):
    """A measurement ended without figures."""


def run_apart(module: str, request: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Runs `python -m module` with the request as JSON on stdin; returns the JSON of its last line.

    Raises TrialFailed, which begins with `what`.
    """
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        said = "it was ended for want of memory" if done.returncode == -signal.SIGKILL else lines[-1]
        raise TrialFailed(f"{what} failed: {said}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values

"""A measurement in a process of its own, whose memory is then its own: how it is asked, and how it answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_trainer.errors import DeviceFull, TrainerError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class TrialFailed(TrainerError):
    """A measurement ended without figures."""


def run_apart(module: str, request: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Runs `python -m module`, which calls `answer`, and returns what it measured.

    Raises TrialFailed, which begins with `what`. What the process leaves in its scratch directory goes, also where it
    was killed.
    """
    with tempfile.TemporaryDirectory(prefix="loramux-trial-") as scratch:
        code, output, errors = _run(module, json.dumps({"request": request, "scratch": scratch}))
    if code:
        lines = errors.strip().splitlines() or [f"it ended with {code}"]
        said = "it was ended for want of memory" if code == -signal.SIGKILL else lines[-1]
        raise TrialFailed(f"{what} failed: {said}")
    values: dict[str, Any] = json.loads(output.splitlines()[-1])
    return values


def _run(module: str, asked: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr. When this returns or raises the process is gone: subprocess.run leaves it after a
    quarter of a second where it is interrupted, still writing to what is then removed.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module],  # -P: what lies in the user's directory is no module of ours
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(asked)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, output, errors


def answer(measure: Callable[[dict[str, Any], Path], DataclassInstance]) -> None:
    """The other side: `measure` is called with the request and the scratch directory, which is empty."""
    values = json.load(sys.stdin)
    try:
        measured = measure(values["request"], Path(values["scratch"]))
    except TrainerError as error:
        sys.exit(str(error))
    except Exception as error:
        from loramux_trainer.fleet.torch_errors import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.exit(str(DeviceFull()))
    print(json.dumps(asdict(measured)))
